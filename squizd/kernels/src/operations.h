// The operations as Python calls them: lazy, and nothing (None) for what the primitives do not do (another device or
// type, odd shapes): the caller then uses MLX.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "primitives.h"

namespace squizd {

namespace nb = nanobind;

// The current stream, if it is a CPU's.
std::optional<mx::Stream> cpu_stream();
// An array that will lie row after row when it is evaluated.
array dense(const array& a);

namespace lazy {

Optional linear(const array& x, const array& w, const Optional& scales, const Optional& biases, int group, int bits, const std::string& mode);
Optional expert_linear(const array& x, const array& ids, const array& w, const Optional& scales, const Optional& biases, int group,
                       int bits, const std::string& mode);
Optional embed(const array& ids, const array& w, const Optional& scales, const Optional& biases, int group, int bits, const std::string& mode);
Optional swiglu_experts(const array& x, const array& ids, const array& gw, const Optional& gs, const Optional& gb, int gg, int gbits,
                        const std::string& gm, const array& uw, const Optional& us, const Optional& ub, int ug, int ubits,
                        const std::string& um, const array& dw, const Optional& ds, const Optional& db, int dg, int dbits,
                        const std::string& dm);
Optional rms_norm(const array& x, const Optional& weight, float eps);
Optional rope(const array& x, int dims, bool traditional, std::optional<float> base, float scale, nb::handle offset, const Optional& freqs);
Optional attention(const array& q, const array& k, const array& v, float scale, nb::handle mask, const Optional& sinks);
std::optional<std::pair<array, array>> append(const array& cache, const array& fresh, int at);

}  // namespace lazy
}  // namespace squizd
