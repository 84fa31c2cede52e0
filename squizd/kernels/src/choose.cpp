// Which of the compiled instruction sets this processor has.
#include "arithmetic.h"

namespace squizd {
extern const Arithmetic plain;
#if defined(__x86_64__)
extern const Arithmetic avx2, avx512;
const Arithmetic* const ALL[] = {&avx512, &avx2, &plain, nullptr};
bool usable(const Arithmetic& which) {
  __builtin_cpu_init();
  const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&which == &avx2) return two;
  if (&which == &avx512)
    return two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return true;
}
#elif defined(__aarch64__)
extern const Arithmetic neon;
const Arithmetic* const ALL[] = {&neon, &plain, nullptr};
bool usable(const Arithmetic&) { return true; }
#else
const Arithmetic* const ALL[] = {&plain, nullptr};
bool usable(const Arithmetic&) { return true; }
#endif
}  // namespace squizd
