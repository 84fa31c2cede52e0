// MLX primitives over work.h, and their Python face. Everything is lazy, as MLX's own operations are: inputs are
// read in place, outputs and scratch come from MLX's allocator, work runs in order on MLX's CPU stream.
//
// Each function returns None for what it does not do (another device or type, odd strides): the caller then uses MLX.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cmath>
#include <memory>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/fast.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "mlx/transforms_impl.h"
#include "mlx/version.h"
#include "work.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using mx::array;
using Arrays = std::vector<array>;

namespace {

// ------------------------------------------------------------------------------------------------ the engine

struct Machine {
  std::unique_ptr<squizd::Pool> pool = std::make_unique<squizd::Pool>(1);
  const squizd::Arithmetic* math = nullptr;
  Machine() {
    for (auto* const* m = squizd::ALL; *m && !math; m++)
      if (squizd::usable(**m)) math = *m;
  }
};
Machine& machine() {
  static Machine* const one = new Machine;  // never destroyed: its threads may outlive static destructors
  return *one;
}
squizd::Engine engine() { return {*machine().pool, *machine().math}; }

// ------------------------------------------------------------------------------------------------- MLX's side

// A primitive that can be replaced by MLX's own operations, which serve gradients and vmap.
class Replacement : public mx::Primitive {
 public:
  using Primitive::Primitive;
  virtual Arrays plain(const Arrays& inputs) const = 0;

  void eval_gpu(const Arrays&, Arrays&) override { throw std::runtime_error("squizd's kernels run on the CPU only"); }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    auto all = mx::vjp([this](const Arrays& in) { return plain(in); }, primals, cotangents).second;
    Arrays out;
    for (int i : argnums) out.push_back(all[i]);
    return out;
  }
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override {
    Arrays full;
    for (size_t i = 0, at = 0; i < primals.size(); i++) {
      const bool given = at < argnums.size() && argnums[at] == int(i);
      full.push_back(given ? tangents[at++] : mx::zeros_like(primals[i]));
    }
    return mx::jvp([this](const Arrays& in) { return plain(in); }, primals, full).second;
  }
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    auto traced = mx::detail::vmap_trace([this](const Arrays& in) { return plain(in); }, inputs, axes);
    std::vector<int> out_axes(traced.second.size(), 0);
    return {mx::detail::vmap_replace(inputs, traced.first, traced.second, axes, out_axes), out_axes};
  }
};

// The current stream, if it is a CPU's.
std::optional<mx::Stream> cpu_stream() {
  const mx::Device& device = mx::default_device();
  if (device != mx::Device::cpu) return std::nullopt;
  return mx::default_stream(device);
}

// An array that will lie row after row when it is evaluated.
array dense(const array& a) {
  return a.status() != array::Status::unscheduled && a.flags().row_contiguous ? a : mx::contiguous(a);
}

// Memory of one operation: large from MLX's allocator, so that it counts there; small from a buffer of the thread that
// computes, because allocating a kilobyte costs as much as a small operation.
struct Scratch {
  static constexpr size_t SMALL = 1 << 16;
  size_t floats;
  float* large = nullptr;
  Scratch(mx::cpu::CommandEncoder& encoder, size_t floats) : floats(floats) {
    if (floats <= SMALL) return;
    array memory(mx::allocator::malloc(floats * sizeof(float)), mx::Shape{int(std::min<size_t>(floats, 1 << 30))}, mx::float32);
    large = memory.data<float>();
    encoder.add_temporary(std::move(memory));
  }
  float* get() const {
    thread_local std::vector<float> small;
    if (large) return large;
    if (small.size() < floats) small.resize(floats);
    return small.data();
  }
};

// `a` [b, h, l, d] itself, or a copy if the numbers of its rows do not lie side by side.
array side_by_side(const array& a, mx::cpu::CommandEncoder& encoder) {
  if (a.strides(3) == 1 || a.shape(3) == 1) return a;
  array copy(mx::allocator::malloc(a.nbytes()), a.shape(), a.dtype());
  encoder.add_temporary(copy);
  encoder.dispatch([from = a.data<float>(), to = copy.data<float>(), shape = a.shape(), step = a.strides()]() mutable {
    for (int b = 0; b < shape[0]; b++)
      for (int h = 0; h < shape[1]; h++)
        for (int l = 0; l < shape[2]; l++)
          for (int d = 0; d < shape[3]; d++) *to++ = from[b * step[0] + h * step[1] + l * step[2] + d * step[3]];
  });
  return copy;
}

// Where the rows (last dimension) of an array lie.
struct Rows {
  const float* base;
  ptrdiff_t stride;  // between the numbers of a row
  int count;
  mx::Shape shape;
  mx::Strides strides;
  bool even;

  explicit Rows(const array& a)
      : base(a.data<float>()), stride(a.shape(-1) == 1 ? 1 : a.strides(-1)), count(a.shape(-1) ? int(a.size() / a.shape(-1)) : 0),
        even(a.flags().row_contiguous) {
    shape = mx::Shape(a.shape().begin(), a.shape().end() - 1);
    strides = even ? mx::Strides{a.shape(-1)} : mx::Strides(a.strides().begin(), a.strides().end() - 1);
  }
  void list(std::vector<const float*>& out) const {
    out.resize(count);
    if (even) {
      for (int i = 0; i < count; i++) out[i] = base + i * strides[0];
      return;
    }
    for (int i = 0; i < count; i++) {
      ptrdiff_t at = 0;
      for (int d = int(shape.size()) - 1, rest = i; d >= 0; d--) {
        at += rest % shape[d] * strides[d];
        rest /= shape[d];
      }
      out[i] = base + at;
    }
  }
};

// Expert ids in order, checked: an id that is no expert must not reach the arithmetic.
struct Ids {
  const uint32_t* base;
  mx::Shape shape;
  mx::Strides strides;
  bool even;
  int count;

  explicit Ids(const array& a)
      : base(a.data<uint32_t>()), shape(a.shape()), strides(a.strides()), even(a.flags().row_contiguous), count(int(a.size())) {}

  const uint32_t* list(std::vector<uint32_t>& copy, int experts, const char* what = "expert slot") const {
    const uint32_t* ids = base;
    if (!even) {
      copy.resize(count);
      for (int i = 0; i < count; i++) {
        ptrdiff_t at = 0;
        for (int d = int(shape.size()) - 1, rest = i; d >= 0; d--) {
          at += rest % shape[d] * strides[d];
          rest /= shape[d];
        }
        copy[i] = base[at];
      }
      ids = copy.data();
    }
    if (!squizd::valid_ids(ids, count, experts)) {
      uint32_t worst = 0;
      for (int i = 0; i < count; i++) worst = std::max(worst, ids[i]);
      throw std::out_of_range(std::string(what) + " " + std::to_string(int32_t(worst)) + " was asked for; there are " + std::to_string(experts));
    }
    return ids;
  }
};

// --------------------------------------------------------------------------------------------------- weights

// How the weights of one layer are stored; their arrays are a primitive's inputs from some place on.
struct Stored {
  int bits = 32, group = 0;
  squizd::Mode mode = squizd::FLOATS;

  int arrays() const { return mode == squizd::AFFINE ? 3 : mode == squizd::MXFP4 ? 2 : 1; }

  squizd::Matrix matrix(const Arrays& in, int at) const {
    const array& w = in[at];
    return {w.data<void>(), mode == squizd::FLOATS ? nullptr : in[at + 1].data<void>(),
            mode == squizd::AFFINE ? in[at + 2].data<float>() : nullptr, w.shape(-2), cols(w), bits, group, mode};
  }
  int cols(const array& w) const { return int(int64_t(w.shape(-1)) * 32 / bits); }

  array plain(const array& x, const Arrays& in, int at) const {
    if (mode == squizd::FLOATS) return mx::matmul(x, mx::swapaxes(in[at], -1, -2));
    auto biases = mode == squizd::AFFINE ? std::optional<array>(in[at + 2]) : std::nullopt;
    return mx::quantized_matmul(x, in[at], in[at + 1], biases, true, group, bits, name());
  }
  array plain_experts(const array& x, const array& ids, const Arrays& in, int at) const {
    if (mode == squizd::FLOATS) return mx::gather_mm(x, mx::swapaxes(in[at], -1, -2), std::nullopt, ids);
    auto biases = mode == squizd::AFFINE ? std::optional<array>(in[at + 2]) : std::nullopt;
    return mx::gather_qmm(x, in[at], in[at + 1], biases, std::nullopt, ids, true, group, bits, name());
  }
  std::string name() const { return mode == squizd::MXFP4 ? "mxfp4" : "affine"; }
  bool operator==(const Stored&) const = default;
};

using Optional = std::optional<array>;

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
  as = {bits, group, affine ? squizd::AFFINE : squizd::MXFP4};
  mx::Shape groups = w.shape();
  groups.back() = width / group;
  if (w.dtype() != mx::uint32 || width % group || as.cols(w) != width || scales->shape() != groups) return false;
  inputs.push_back(dense(w));
  inputs.push_back(dense(*scales));
  if (affine) inputs.push_back(dense(*biases));
  return true;
}

squizd::Experts experts(const Stored& as, const Arrays& in, int at) { return {as.matrix(in, at), in[at].shape(0)}; }

// ------------------------------------------------------------------------------------------------ primitives

class Linear : public Replacement {
 public:
  Linear(mx::Stream s, Stored as) : Replacement(s), as_(as) {}
  const char* name() const override { return "SquizdLinear"; }
  bool is_equivalent(const Primitive& other) const override { return as_ == static_cast<const Linear&>(other).as_; }
  Arrays plain(const Arrays& in) const override { return {as_.plain(in[0], in, 1)}; }

  void eval_cpu(const Arrays& in, Arrays& outputs) override {
    array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const squizd::Matrix w = as_.matrix(in, 1);
    Rows x(in[0]);
    const Scratch memory(encoder, squizd::linear_floats(w, x.count));
    encoder.dispatch([w, x = std::move(x), y = out.data<float>(), memory] {
      thread_local std::vector<const float*> rows;
      thread_local std::vector<float*> outs;
      x.list(rows);
      outs.resize(x.count);
      for (int i = 0; i < x.count; i++) outs[i] = y + size_t(i) * w.rows;
      squizd::linear(engine(), w, rows.data(), x.stride, x.count, outs.data(), memory.get());
    });
  }

 private:
  Stored as_;
};

// x [..., 1, width] against expert ids [...] -> [..., 1, rows]; leading dimensions are broadcast already
class ExpertLinear : public Replacement {
 public:
  ExpertLinear(mx::Stream s, Stored as) : Replacement(s), as_(as) {}
  const char* name() const override { return "SquizdExpertLinear"; }
  bool is_equivalent(const Primitive& other) const override { return as_ == static_cast<const ExpertLinear&>(other).as_; }
  Arrays plain(const Arrays& in) const override { return {as_.plain_experts(in[0], in[1], in, 2)}; }

  void eval_cpu(const Arrays& in, Arrays& outputs) override {
    array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const squizd::Experts w = experts(as_, in, 2);
    Rows x(in[0]);
    Ids ids(in[1]);
    const Scratch memory(encoder, squizd::expert_linear_floats(w, x.count));
    encoder.dispatch([w, x = std::move(x), ids = std::move(ids), y = out.data<float>(), memory] {
      thread_local std::vector<const float*> rows;
      thread_local std::vector<float*> outs;
      thread_local std::vector<uint32_t> copy;
      const uint32_t* chosen = ids.list(copy, w.count);
      x.list(rows);
      outs.resize(x.count);
      for (int i = 0; i < x.count; i++) outs[i] = y + size_t(i) * w.first.rows;
      squizd::expert_linear(engine(), w, rows.data(), x.stride, chosen, x.count, outs.data(), memory.get());
    });
  }

 private:
  Stored as_;
};

// x [..., width] and expert ids [..., k] -> [..., k, width of down]
class SwigluExperts : public Replacement {
 public:
  SwigluExperts(mx::Stream s, Stored gate, Stored up, Stored down) : Replacement(s), gate_(gate), up_(up), down_(down) {}
  const char* name() const override { return "SquizdSwigluExperts"; }
  bool is_equivalent(const Primitive& other) const override {
    auto& o = static_cast<const SwigluExperts&>(other);
    return gate_ == o.gate_ && up_ == o.up_ && down_ == o.down_;
  }
  Arrays plain(const Arrays& in) const override {
    array x = mx::expand_dims(in[0], {-2, -3});
    const int up = 2 + gate_.arrays();
    array g = gate_.plain_experts(x, in[1], in, 2), u = up_.plain_experts(x, in[1], in, up);
    array h = mx::multiply(mx::multiply(g, mx::sigmoid(g)), u);
    return {mx::squeeze(down_.plain_experts(h, in[1], in, up + up_.arrays()), -2)};
  }

  void eval_cpu(const Arrays& in, Arrays& outputs) override {
    array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const int at_up = 2 + gate_.arrays(), at_down = at_up + up_.arrays();
    const squizd::Experts gate = experts(gate_, in, 2), up = experts(up_, in, at_up), down = experts(down_, in, at_down);
    Rows x(in[0]);
    Ids ids(in[1]);
    const int choices = in[1].shape(-1);
    const Scratch memory(encoder, squizd::swiglu_experts_floats(gate, down, x.count, choices));
    encoder.dispatch([gate, up, down, x = std::move(x), ids = std::move(ids), choices, y = out.data<float>(), memory] {
      thread_local std::vector<const float*> rows;
      thread_local std::vector<uint32_t> copy;
      const uint32_t* chosen = ids.list(copy, gate.count);
      x.list(rows);
      squizd::swiglu_experts(engine(), gate, up, down, rows.data(), x.stride, x.count, choices, chosen, y, memory.get());
    });
  }

 private:
  Stored gate_, up_, down_;
};

// Rows of a quantized table: ids [...] -> [..., cols]
class Embed : public Replacement {
 public:
  Embed(mx::Stream s, Stored as) : Replacement(s), as_(as) {}
  const char* name() const override { return "SquizdEmbed"; }
  bool is_equivalent(const Primitive& other) const override { return as_ == static_cast<const Embed&>(other).as_; }
  Arrays plain(const Arrays& in) const override {
    auto pick = [&](int i) { return mx::take(in[i], in[0], 0); };
    return {mx::dequantize(pick(1), pick(2), as_.arrays() == 3 ? Optional(pick(3)) : std::nullopt, as_.group, as_.bits, as_.name())};
  }

  void eval_cpu(const Arrays& in, Arrays& outputs) override {
    array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    mx::cpu::get_command_encoder(stream()).dispatch([w = as_.matrix(in, 1), ids = Ids(in[0]), y = out.data<float>()] {
      thread_local std::vector<uint32_t> copy;
      squizd::embed(engine(), w, ids.list(copy, w.rows, "row"), ids.count, y);
    });
  }

 private:
  Stored as_;
};

class RmsNorm : public Replacement {
 public:
  RmsNorm(mx::Stream s, float eps) : Replacement(s), eps_(eps) {}
  const char* name() const override { return "SquizdRmsNorm"; }
  bool is_equivalent(const Primitive& other) const override { return eps_ == static_cast<const RmsNorm&>(other).eps_; }
  Arrays plain(const Arrays& in) const override {
    return {mx::fast::rms_norm(in[0], in.size() > 1 ? Optional(in[1]) : std::nullopt, eps_, stream_())};
  }
  void eval_cpu(const Arrays& in, Arrays& outputs) override {
    array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const float* weight = in.size() > 1 ? in[1].data<float>() : nullptr;
    encoder.dispatch([x = Rows(in[0]), y = out.data<float>(), weight, size = out.shape(-1), eps = eps_] {
      thread_local std::vector<const float*> rows;
      x.list(rows);
      const float* const* from = rows.data();  // helpers have a `rows` of their own
      const squizd::Engine e = engine();
      constexpr int PART = 64;
      e.pool.run((x.count + PART - 1) / PART, double(x.count) * size < 1e5, [&](int task, int) {
        for (int i = task * PART; i < x.count && i < (task + 1) * PART; i++)
          e.math.rms_norm(from[i], x.stride, weight, size, eps, y + size_t(i) * size);
      });
    });
  }

 private:
  mx::Stream stream_() const { return const_cast<RmsNorm*>(this)->stream(); }
  float eps_;
};

// x [batch, heads, length, width], offset: one integer or one per batch; frequencies: periods as mx.fast.rope takes them
class Rope : public Replacement {
 public:
  Rope(mx::Stream s, int dims, bool traditional, std::optional<float> base, float scale, int offset, bool given)
      : Replacement(s), dims_(dims), traditional_(traditional), base_(base), scale_(scale), offset_(offset), offset_given_(given) {}
  const char* name() const override { return "SquizdRope"; }
  bool is_equivalent(const Primitive& other) const override {
    auto& o = static_cast<const Rope&>(other);
    return dims_ == o.dims_ && traditional_ == o.traditional_ && base_ == o.base_ && scale_ == o.scale_ && offset_ == o.offset_ &&
           offset_given_ == o.offset_given_;
  }
  Arrays plain(const Arrays& in) const override {
    const int at = offset_given_ ? 2 : 1;
    Optional periods = int(in.size()) > at ? Optional(in[at]) : std::nullopt;
    if (offset_given_) return {mx::fast::rope(in[0], dims_, traditional_, base_, scale_, in[1], periods)};
    return {mx::fast::rope(in[0], dims_, traditional_, base_, scale_, offset_, periods)};
  }

  void eval_cpu(const Arrays& in, Arrays& outputs) override {
    array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const int half = dims_ / 2, length = in[0].shape(-2), width = in[0].shape(-1), at = offset_given_ ? 2 : 1;
    const int batch = in[0].shape(0), heads = int(in[0].size() / (size_t(batch) * length * width));
    const int32_t* offsets = offset_given_ ? in[1].data<int32_t>() : nullptr;
    const int step = offset_given_ && in[1].size() > 1 ? 1 : 0;
    const float* periods = int(in.size()) > at ? in[at].data<float>() : nullptr;
    const Scratch memory(encoder, size_t(length + 1) * dims_);
    encoder.dispatch([x = Rows(in[0]), y = out.data<float>(), half, length, width, batch, heads, offsets, step, periods,
                      memory, dims = dims_, traditional = traditional_, scale = scale_, base = base_.value_or(1), first = offset_] {
      thread_local std::vector<const float*> rows;
      x.list(rows);
      float *table = memory.get(), *speed = table + size_t(length) * dims;
      for (int j = 0; j < half; j++)
        speed[j] = periods ? 1.f / periods[j] : float(std::exp(-double(j) / half * std::log(double(base))));
      for (int b = 0; b < batch; b++) {
        if (b == 0 || step) {
          const int start = offsets ? offsets[b * step] : first;
          for (int l = 0; l < length; l++)
            for (int j = 0; j < half; j++) {
              const float angle = scale * float(start + l) * speed[j];
              table[l * dims + j] = std::cos(angle);
              table[l * dims + half + j] = std::sin(angle);
            }
        }
        for (int r = b * heads * length; r < (b + 1) * heads * length; r++) {
          const float *cosine = table + r % length * dims, *sine = cosine + half, *from = rows[r];
          float* to = y + size_t(r) * width;
          const ptrdiff_t s = x.stride;
          if (traditional) {
            for (int j = 0; j < half; j++) {
              const float p = from[2 * j * s], q = from[(2 * j + 1) * s];
              to[2 * j] = p * cosine[j] - q * sine[j];
              to[2 * j + 1] = p * sine[j] + q * cosine[j];
            }
          } else {
            for (int j = 0; j < half; j++) {
              const float p = from[j * s], q = from[(half + j) * s];
              to[j] = p * cosine[j] - q * sine[j];
              to[half + j] = p * sine[j] + q * cosine[j];
            }
          }
          for (int j = dims; j < width; j++) to[j] = from[j * s];
        }
      }
    });
  }

 private:
  int dims_;
  bool traditional_;
  std::optional<float> base_;
  float scale_;
  int offset_;
  bool offset_given_;
};

class Attend : public Replacement {
 public:
  Attend(mx::Stream s, float scale, bool causal, bool mask, bool sinks)
      : Replacement(s), scale_(scale), causal_(causal), mask_(mask), sinks_(sinks) {}
  const char* name() const override { return "SquizdAttention"; }
  bool is_equivalent(const Primitive& other) const override {
    auto& o = static_cast<const Attend&>(other);
    return scale_ == o.scale_ && causal_ == o.causal_ && mask_ == o.mask_ && sinks_ == o.sinks_;
  }
  Arrays plain(const Arrays& in) const override {
    Optional mask = mask_ ? Optional(in[3]) : std::nullopt, sinks = sinks_ ? Optional(in.back()) : std::nullopt;
    return {mx::fast::scaled_dot_product_attention(in[0], in[1], in[2], scale_, causal_ ? "causal" : "", mask, sinks)};
  }

  void eval_cpu(const Arrays& in, Arrays& outputs) override {
    array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const array q = side_by_side(in[0], encoder), k = side_by_side(in[1], encoder), v = side_by_side(in[2], encoder);
    const int groups = k.shape(1), heads = q.shape(1) / groups, batch = q.shape(0);
    squizd::Attention a{};
    a.q_head = q.strides(1), a.q_row = q.strides(2), a.k_row = k.strides(2), a.v_row = v.strides(2);
    a.out_head = out.strides(1), a.out_row = out.strides(2);
    a.queries = q.shape(2), a.keys = k.shape(2), a.width = q.shape(3), a.value_width = v.shape(3);
    a.causal = causal_, a.scale = scale_;
    const std::array<ptrdiff_t, 6> steps{q.strides(0), k.strides(0), v.strides(0), out.strides(0), k.strides(1), v.strides(1)};
    ptrdiff_t mask_batch = 0;
    const char* mask = nullptr;
    if (mask_) {
      const array& m = in[3];
      mask = m.data<char>();
      a.mask_is_bool = m.dtype() == mx::bool_;
      mask_batch = m.strides(0) * ptrdiff_t(m.itemsize());
      a.mask_head = m.strides(1), a.mask_row = m.strides(2), a.mask_col = m.strides(3);
    }
    const float* sinks = sinks_ ? in.back().data<float>() : nullptr;
    encoder.dispatch([a, groups, heads, batch, steps, mask,
                      mask_batch, item = a.mask_is_bool ? 1 : 4, sinks, qp = q.data<float>(), kp = k.data<float>(),
                      vp = v.data<float>(), op = out.data<float>()] {
      squizd::attention(engine(), batch * groups, heads, a,
                        [&](int task) {
                          const int b = task / groups, g = task % groups;
                          squizd::Attention mine = a;
                          mine.q = qp + b * steps[0] + g * heads * a.q_head;
                          mine.k = kp + b * steps[1] + g * steps[4];
                          mine.v = vp + b * steps[2] + g * steps[5];
                          mine.out = op + b * steps[3] + g * heads * a.out_head;
                          mine.mask = mask ? mask + b * mask_batch + g * heads * a.mask_head * item : nullptr;
                          mine.sinks = sinks ? sinks + g * heads : nullptr;
                          return mine;
                        });
    });
  }

 private:
  float scale_;
  bool causal_, mask_, sinks_;
};

// ------------------------------------------------------------------------------------------------ operations

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
    if (a->dtype() != mx::float32 || a->ndim() != 4 || a->size() == 0 || a->shape(3) % squizd::LANES) return std::nullopt;
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

}  // namespace

NB_MODULE(_native, m) {
  nb::module_::import_("mlx.core");
  m.attr("mlx_version") = std::to_string(MLX_VERSION_MAJOR) + "." + std::to_string(MLX_VERSION_MINOR) + "." + std::to_string(MLX_VERSION_PATCH);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (auto* const* i = squizd::ALL; *i; i++)
      if (squizd::usable(**i)) names.push_back((*i)->name);
    return names;
  }, "Those that this processor has, best first.");
  m.def("use", [](const std::string& name) {
    for (auto* const* i = squizd::ALL; *i; i++)
      if (squizd::usable(**i) && name == (*i)->name) {
        machine().math = *i;
        return true;
      }
    return false;
  }, nb::arg("instruction_set"));
  m.def("in_use", [] { return std::string(machine().math->name); });
  m.def("set_threads", [](int n) { machine().pool = std::make_unique<squizd::Pool>(n); }, nb::arg("count"));
  m.def("threads", [] { return machine().pool->workers(); });
  m.def("linear", &linear);
  m.def("expert_linear", &expert_linear);
  m.def("swiglu_experts", &swiglu_experts);
  m.def("embed", &embed);
  m.def("append", &append);
  m.def("rms_norm", &rms_norm, nb::arg(), nb::arg().none(), nb::arg());
  m.def("rope", &rope);
  m.def("attention", &attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none());
}
