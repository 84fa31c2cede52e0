#include "operations.h"

namespace squizd {

std::optional<mx::Stream> cpu_stream() {
  const mx::Device& device = mx::default_device();
  if (device != mx::Device::cpu) return std::nullopt;
  return mx::default_stream(device);
}

array dense(const array& a) {
  return a.status() != array::Status::unscheduled && a.flags().row_contiguous ? a : mx::contiguous(a);
}

namespace {

// Adds the arrays to a primitive's inputs; false if this is not a layer for us. `dims` of the weight: 2, or 3 for experts.
bool store(Arrays& inputs, Stored& as, const array& w, const Optional& scales, const Optional& biases, int group, int bits,
           const std::string& mode, int dims, int width) {
  if (int(w.ndim()) != dims || w.size() == 0) return false;
  if (!scales) {
    if (w.dtype() != mx::float32 || w.shape(-1) != width) return false;
    inputs.push_back(dense(w));
    return true;
  }
  const bool affine = mode == "affine";
  if (!affine && mode != "mxfp4") return false;
  if (affine && (!biases || biases->dtype() != mx::float32 || scales->dtype() != mx::float32 || biases->shape() != scales->shape())) return false;
  if (!affine && (scales->dtype() != mx::uint8 || bits != 4 || group != 32)) return false;
  if (bits < 2 || bits > 8 || bits == 7 || (group != 32 && group != 64 && group != 128)) return false;
  as = {bits, group, affine ? AFFINE : MXFP4};
  mx::Shape groups = w.shape();
  groups.back() = width / group;
  if (w.dtype() != mx::uint32 || width % group || as.cols(w) != width || scales->shape() != groups) return false;
  inputs.push_back(dense(w));
  inputs.push_back(dense(*scales));
  if (affine) inputs.push_back(dense(*biases));
  return true;
}

}  // namespace

namespace lazy {

Optional linear(const array& x, const array& w, const Optional& scales, const Optional& biases, int group, int bits, const std::string& mode) {
  auto s = cpu_stream();
  if (!s || x.dtype() != mx::float32 || x.ndim() < 1) return std::nullopt;
  Stored as;
  Arrays inputs{x};
  if (!store(inputs, as, w, scales, biases, group, bits, mode, 2, x.shape(-1))) return std::nullopt;
  mx::Shape shape = x.shape();
  shape.back() = w.shape(0);
  return array(std::move(shape), mx::float32, std::make_shared<Linear>(*s, as), std::move(inputs));
}

Optional expert_linear(const array& x, const array& ids, const array& w, const Optional& scales, const Optional& biases, int group,
                       int bits, const std::string& mode) {
  auto s = cpu_stream();
  if (!s || x.dtype() != mx::float32 || x.ndim() < 2 || x.shape(-2) != 1) return std::nullopt;
  mx::Shape lead = mx::broadcast_shapes(mx::Shape(x.shape().begin(), x.shape().end() - 2), ids.shape());
  mx::Shape full = lead;
  full.push_back(1);
  full.push_back(x.shape(-1));
  Stored as;
  Arrays inputs{x.shape() == full ? x : mx::broadcast_to(x, full), ids.dtype() == mx::uint32 ? ids : mx::astype(ids, mx::uint32)};
  if (ids.shape() != lead) inputs[1] = mx::broadcast_to(inputs[1], lead);
  if (!store(inputs, as, w, scales, biases, group, bits, mode, 3, x.shape(-1))) return std::nullopt;
  full.back() = w.shape(1);
  return array(std::move(full), mx::float32, std::make_shared<ExpertLinear>(*s, as), std::move(inputs));
}

Optional embed(const array& ids, const array& w, const Optional& scales, const Optional& biases, int group, int bits, const std::string& mode) {
  auto s = cpu_stream();
  if (!s || !scales || !biases || w.ndim() != 2 || !mx::issubdtype(ids.dtype(), mx::integer)) return std::nullopt;
  Stored as;
  Arrays inputs{ids.dtype() == mx::uint32 ? ids : mx::astype(ids, mx::uint32)};
  const int width = bits ? int(int64_t(w.shape(1)) * 32 / bits) : 0;
  if (!store(inputs, as, w, scales, biases, group, bits, mode, 2, width)) return std::nullopt;
  mx::Shape shape = ids.shape();
  shape.push_back(width);
  return array(std::move(shape), mx::float32, std::make_shared<Embed>(*s, as), std::move(inputs));
}

Optional swiglu_experts(const array& x, const array& ids, const array& gw, const Optional& gs, const Optional& gb, int gg, int gbits,
                        const std::string& gm, const array& uw, const Optional& us, const Optional& ub, int ug, int ubits,
                        const std::string& um, const array& dw, const Optional& ds, const Optional& db, int dg, int dbits,
                        const std::string& dm) {
  auto s = cpu_stream();
  if (!s || x.dtype() != mx::float32 || x.ndim() < 1 || ids.ndim() != x.ndim()) return std::nullopt;
  for (int i = 0; i + 1 < int(x.ndim()); i++)
    if (x.shape(i) != ids.shape(i)) return std::nullopt;
  Stored gate, up, down;
  Arrays inputs{x, ids.dtype() == mx::uint32 ? ids : mx::astype(ids, mx::uint32)};
  if (gw.ndim() != 3 || uw.ndim() != 3 || gw.shape(0) != uw.shape(0) || gw.shape(1) != uw.shape(1) || dw.ndim() != 3 ||
      dw.shape(0) != gw.shape(0))
    return std::nullopt;
  if (!store(inputs, gate, gw, gs, gb, gg, gbits, gm, 3, x.shape(-1)) || !store(inputs, up, uw, us, ub, ug, ubits, um, 3, x.shape(-1)) ||
      !store(inputs, down, dw, ds, db, dg, dbits, dm, 3, gw.shape(1)))
    return std::nullopt;
  mx::Shape shape = ids.shape();
  shape.push_back(dw.shape(1));
  return array(std::move(shape), mx::float32, std::make_shared<SwigluExperts>(*s, gate, up, down), std::move(inputs));
}

Optional rms_norm(const array& x, const Optional& weight, float eps) {
  auto s = cpu_stream();
  if (!s || x.dtype() != mx::float32 || x.ndim() < 1 || x.size() == 0) return std::nullopt;
  Arrays inputs{x};
  if (weight) {
    if (weight->dtype() != mx::float32 || weight->ndim() != 1 || weight->shape(0) != x.shape(-1)) return std::nullopt;
    inputs.push_back(dense(*weight));
  }
  return array(x.shape(), mx::float32, std::make_shared<RmsNorm>(*s, eps), std::move(inputs));
}

Optional rope(const array& x, int dims, bool traditional, std::optional<float> base, float scale, nb::handle offset, const Optional& freqs) {
  auto s = cpu_stream();
  if (!s || x.dtype() != mx::float32 || x.ndim() < 3 || x.size() == 0) return std::nullopt;
  if (dims < 2 || dims % 2 || dims > x.shape(-1) || base.has_value() == freqs.has_value()) return std::nullopt;
  if (freqs && (freqs->dtype() != mx::float32 || freqs->ndim() != 1 || freqs->shape(0) != dims / 2)) return std::nullopt;
  Arrays inputs{x};
  int start = 0;
  bool given = false;
  if (!nb::try_cast<int>(offset, start, false)) {
    array at(0);
    if (!nb::try_cast<array>(offset, at, false)) return std::nullopt;
    if (!mx::issubdtype(at.dtype(), mx::integer) || at.ndim() > 1 || (at.ndim() == 1 && at.shape(0) != 1 && at.shape(0) != x.shape(0)))
      return std::nullopt;
    inputs.push_back(dense(mx::astype(at, mx::int32)));
    given = true;
  }
  if (freqs) inputs.push_back(dense(*freqs));
  return array(x.shape(), mx::float32, std::make_shared<Rope>(*s, dims, traditional, base, scale, start, given), std::move(inputs));
}

Optional attention(const array& q, const array& k, const array& v, float scale, nb::handle mask, const Optional& sinks) {
  auto s = cpu_stream();
  if (!s) return std::nullopt;
  for (const array* a : {&q, &k, &v})
    if (a->dtype() != mx::float32 || a->ndim() != 4 || a->size() == 0 || a->shape(3) % LANES) return std::nullopt;
  if (k.shape(0) != q.shape(0) || v.shape(0) != q.shape(0) || k.shape(1) != v.shape(1) || q.shape(1) % k.shape(1) ||
      k.shape(2) != v.shape(2) || q.shape(3) != k.shape(3))
    return std::nullopt;
  Arrays inputs{q, k, v};
  bool causal = false, masked = false;
  if (!mask.is_none()) {
    array m(0);
    if (std::string mode; nb::try_cast<std::string>(mask, mode, false)) {
      if (mode != "causal" || q.shape(2) > k.shape(2)) return std::nullopt;
      causal = true;
    } else if (nb::try_cast<array>(mask, m, false)) {
      if (m.ndim() > 4 || (m.dtype() != mx::bool_ && m.dtype() != mx::float32)) return std::nullopt;
      inputs.push_back(mx::broadcast_to(m, {q.shape(0), q.shape(1), q.shape(2), k.shape(2)}));
      masked = true;
    } else {
      return std::nullopt;
    }
  }
  if (sinks) {
    if (sinks->dtype() != mx::float32 || sinks->ndim() != 1 || sinks->shape(0) != q.shape(1)) return std::nullopt;
    inputs.push_back(dense(*sinks));
  }
  mx::Shape shape = q.shape();
  shape[3] = v.shape(3);
  return array(std::move(shape), mx::float32, std::make_shared<Attend>(*s, scale, causal, masked, sinks.has_value()), std::move(inputs));
}

// `cache[..., at : at + n, :] = fresh` and `cache[..., : at + n, :]`, as MLX's Python indexing builds them, without its cost.
std::optional<std::pair<array, array>> append(const array& cache, const array& fresh, int at) {
  if (!cpu_stream() || cache.ndim() != 4 || fresh.ndim() != 4 || cache.dtype() != fresh.dtype()) return std::nullopt;
  for (int d : {0, 1, 3})
    if (cache.shape(d) != fresh.shape(d)) return std::nullopt;
  const int end = at + fresh.shape(2);
  if (at < 0 || end > cache.shape(2)) return std::nullopt;
  mx::Shape start{0, 0, at, 0}, stop = cache.shape();
  stop[2] = end;
  array whole = mx::slice_update(cache, fresh, start, stop);
  return std::pair(whole, end == cache.shape(2) ? whole : mx::slice(whole, {0, 0, 0, 0}, stop));
}

}  // namespace lazy
}  // namespace squizd
