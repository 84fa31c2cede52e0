// What a thread does between two looks at something that another is about to change.
#pragma once

namespace squizd {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace squizd
