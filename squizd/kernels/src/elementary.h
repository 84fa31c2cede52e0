// MLX's small operations on evaluated arrays, as jobs: what lies between the kernels when a token is replayed.
#pragma once
#include "primitives.h"

namespace squizd {

// Makes `outs` of evaluated `in` as `p` would, with the bits of MLX's CPU backend. A view needs no job, so the job may be
// empty. False if `p` is not one of the operations that are known here.
bool elementary(mx::Primitive& p, const Arrays& in, Arrays& outs, Job& job, Arrays& kept);

// The elements of float32 `a` in order, into row-contiguous `out`.
Job copy_of(const array& a, array& out);

}  // namespace squizd
