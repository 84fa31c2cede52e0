#include "primitives.h"

#include <array>
#include <cmath>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/fast.h"
#include "mlx/transforms_impl.h"

namespace squizd {

Machine::Machine() {
  for (auto* const* m = ALL; *m && !math; m++)
    if (usable(**m)) math = *m;
}
Machine& machine() {
  static Machine* const one = new Machine;  // never destroyed: its threads may outlive static destructors
  return *one;
}

// ---------------------------------------------------------------------------------------------- what all do

void Replacement::eval_cpu(const Arrays& in, Arrays& outputs) {
  array& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) return;
  Arrays kept;
  Job job = prepare(in, out, kept);
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.add_temporaries(std::move(kept));
  encoder.dispatch(std::move(job));
}
Arrays Replacement::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) {
  auto all = mx::vjp([this](const Arrays& in) { return plain(in); }, primals, cotangents).second;
  Arrays out;
  for (int i : argnums) out.push_back(all[i]);
  return out;
}
Arrays Replacement::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  Arrays full;
  for (size_t i = 0, at = 0; i < primals.size(); i++) {
    const bool given = at < argnums.size() && argnums[at] == int(i);
    full.push_back(given ? tangents[at++] : mx::zeros_like(primals[i]));
  }
  return mx::jvp([this](const Arrays& in) { return plain(in); }, primals, full).second;
}
std::pair<Arrays, std::vector<int>> Replacement::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  auto traced = mx::detail::vmap_trace([this](const Arrays& in) { return plain(in); }, inputs, axes);
  std::vector<int> out_axes(traced.second.size(), 0);
  return {mx::detail::vmap_replace(inputs, traced.first, traced.second, axes, out_axes), out_axes};
}

namespace {

// Memory of one operation: large from MLX's allocator, so that it counts there; small from a buffer of the thread that
// computes, because allocating a kilobyte costs as much as a small operation.
struct Scratch {
  static constexpr size_t SMALL = 1 << 16;
  size_t floats;
  float* large = nullptr;
  Scratch(Arrays& kept, size_t floats) : floats(floats) {
    if (floats <= SMALL) return;
    array memory(mx::allocator::malloc(floats * sizeof(float)), mx::Shape{int(std::min<size_t>(floats, 1 << 30))}, mx::float32);
    large = memory.data<float>();
    kept.push_back(std::move(memory));
  }
  float* get() const {
    thread_local std::vector<float> small;
    if (large) return large;
    if (small.size() < floats) small.resize(floats);
    return small.data();
  }
};

// `a` [b, h, l, d] itself, or a place for a copy if the numbers of its rows do not lie side by side; then `fill` fills it.
array side_by_side(const array& a, Arrays& kept, Job& fill) {
  if (a.strides(3) == 1 || a.shape(3) == 1) return a;
  array copy(mx::allocator::malloc(a.nbytes()), a.shape(), a.dtype());
  kept.push_back(copy);
  fill = [before = std::move(fill), from = a.data<float>(), to = copy.data<float>(), shape = a.shape(), step = a.strides()] {
    if (before) before();
    float* at = to;
    for (int b = 0; b < shape[0]; b++)
      for (int h = 0; h < shape[1]; h++)
        for (int l = 0; l < shape[2]; l++)
          for (int d = 0; d < shape[3]; d++) *at++ = from[b * step[0] + h * step[1] + l * step[2] + d * step[3]];
  };
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

}  // namespace

Ids::Ids(const array& a)
    : base(a.data<uint32_t>()), shape(a.shape()), strides(a.strides()), even(a.flags().row_contiguous), count(int(a.size())) {}

const uint32_t* Ids::list(std::vector<uint32_t>& copy, int experts, const char* what) const {
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
  if (!valid_ids(ids, count, experts)) {
    uint32_t worst = 0;
    for (int i = 0; i < count; i++) worst = std::max(worst, ids[i]);
    throw std::out_of_range(std::string(what) + " " + std::to_string(int32_t(worst)) + " was asked for; there are " + std::to_string(experts));
  }
  return ids;
}

// --------------------------------------------------------------------------------------------------- weights

Matrix Stored::matrix(const Arrays& in, int at) const {
  const array& w = in[at];
  return {w.data<void>(), mode == FLOATS ? nullptr : in[at + 1].data<void>(), mode == AFFINE ? in[at + 2].data<float>() : nullptr,
          w.shape(-2), cols(w), bits, group, mode};
}
array Stored::plain(const array& x, const Arrays& in, int at) const {
  if (mode == FLOATS) return mx::matmul(x, mx::swapaxes(in[at], -1, -2));
  auto biases = mode == AFFINE ? Optional(in[at + 2]) : std::nullopt;
  return mx::quantized_matmul(x, in[at], in[at + 1], biases, true, group, bits, name());
}
array Stored::plain_experts(const array& x, const array& ids, const Arrays& in, int at) const {
  if (mode == FLOATS) return mx::gather_mm(x, mx::swapaxes(in[at], -1, -2), std::nullopt, ids);
  auto biases = mode == AFFINE ? Optional(in[at + 2]) : std::nullopt;
  return mx::gather_qmm(x, in[at], in[at + 1], biases, std::nullopt, ids, true, group, bits, name());
}

// ------------------------------------------------------------------------------------------------ primitives

Job Linear::prepare(const Arrays& in, array& out, Arrays& kept) const {
  const Matrix w = as_.matrix(in, 1);
  Rows x(in[0]);
  const Scratch memory(kept, linear_floats(w, x.count));
  return [w, x = std::move(x), y = out.data<float>(), memory] {
    thread_local std::vector<const float*> rows;
    thread_local std::vector<float*> outs;
    x.list(rows);
    outs.resize(x.count);
    for (int i = 0; i < x.count; i++) outs[i] = y + size_t(i) * w.rows;
    linear(engine(), w, rows.data(), x.stride, x.count, outs.data(), memory.get());
  };
}

Job ExpertLinear::prepare(const Arrays& in, array& out, Arrays& kept) const {
  const Experts w = as_.experts(in, 2);
  Rows x(in[0]);
  Ids ids(in[1]);
  const Scratch memory(kept, expert_linear_floats(w, x.count));
  return [w, x = std::move(x), ids = std::move(ids), y = out.data<float>(), memory] {
    thread_local std::vector<const float*> rows;
    thread_local std::vector<float*> outs;
    thread_local std::vector<uint32_t> copy;
    const uint32_t* chosen = ids.list(copy, w.count);
    x.list(rows);
    outs.resize(x.count);
    for (int i = 0; i < x.count; i++) outs[i] = y + size_t(i) * w.first.rows;
    expert_linear(engine(), w, rows.data(), x.stride, chosen, x.count, outs.data(), memory.get());
  };
}

Arrays SwigluExperts::plain(const Arrays& in) const {
  array x = mx::expand_dims(in[0], {-2, -3});
  const int up = 2 + gate_.arrays();
  array g = gate_.plain_experts(x, in[1], in, 2), u = up_.plain_experts(x, in[1], in, up);
  array h = mx::multiply(mx::multiply(g, mx::sigmoid(g)), u);
  return {mx::squeeze(down_.plain_experts(h, in[1], in, up + up_.arrays()), -2)};
}
Job SwigluExperts::prepare(const Arrays& in, array& out, Arrays& kept) const {
  const int at_up = 2 + gate_.arrays(), at_down = at_up + up_.arrays();
  const Experts gate = gate_.experts(in, 2), up = up_.experts(in, at_up), down = down_.experts(in, at_down);
  Rows x(in[0]);
  Ids ids(in[1]);
  const int choices = in[1].shape(-1);
  const Scratch memory(kept, swiglu_experts_floats(gate, down, x.count, choices));
  return [gate, up, down, x = std::move(x), ids = std::move(ids), choices, y = out.data<float>(), memory] {
    thread_local std::vector<const float*> rows;
    thread_local std::vector<uint32_t> copy;
    const uint32_t* chosen = ids.list(copy, gate.count);
    x.list(rows);
    swiglu_experts(engine(), gate, up, down, rows.data(), x.stride, x.count, choices, chosen, y, memory.get());
  };
}

Arrays Embed::plain(const Arrays& in) const {
  auto pick = [&](int i) { return mx::take(in[i], in[0], 0); };
  return {mx::dequantize(pick(1), pick(2), as_.arrays() == 3 ? Optional(pick(3)) : std::nullopt, as_.group, as_.bits, as_.name())};
}
Job Embed::prepare(const Arrays& in, array& out, Arrays&) const {
  return [w = as_.matrix(in, 1), ids = Ids(in[0]), y = out.data<float>()] {
    thread_local std::vector<uint32_t> copy;
    embed(engine(), w, ids.list(copy, w.rows, "row"), ids.count, y);
  };
}

Arrays RmsNorm::plain(const Arrays& in) const {
  return {mx::fast::rms_norm(in[0], in.size() > 1 ? Optional(in[1]) : std::nullopt, eps_, here())};
}
Job RmsNorm::prepare(const Arrays& in, array& out, Arrays&) const {
  const float* weight = in.size() > 1 ? in[1].data<float>() : nullptr;
  return [x = Rows(in[0]), y = out.data<float>(), weight, size = out.shape(-1), eps = eps_] {
    thread_local std::vector<const float*> rows;
    x.list(rows);
    const float* const* from = rows.data();  // helpers have a `rows` of their own
    const Engine e = engine();
    constexpr int PART = 64;
    e.pool.run((x.count + PART - 1) / PART, double(x.count) * size < 1e5, [&](int task, int) {
      for (int i = task * PART; i < x.count && i < (task + 1) * PART; i++)
        e.math.rms_norm(from[i], x.stride, weight, size, eps, y + size_t(i) * size);
    });
  };
}

bool Rope::is_equivalent(const Primitive& other) const {
  auto& o = static_cast<const Rope&>(other);
  return dims_ == o.dims_ && traditional_ == o.traditional_ && base_ == o.base_ && scale_ == o.scale_ && offset_ == o.offset_ &&
         offset_given_ == o.offset_given_;
}
Arrays Rope::plain(const Arrays& in) const {
  const int at = offset_given_ ? 2 : 1;
  Optional periods = int(in.size()) > at ? Optional(in[at]) : std::nullopt;
  if (offset_given_) return {mx::fast::rope(in[0], dims_, traditional_, base_, scale_, in[1], periods)};
  return {mx::fast::rope(in[0], dims_, traditional_, base_, scale_, offset_, periods)};
}
Job Rope::prepare(const Arrays& in, array& out, Arrays& kept) const {
  const int half = dims_ / 2, length = in[0].shape(-2), width = in[0].shape(-1), at = offset_given_ ? 2 : 1;
  const int batch = in[0].shape(0), heads = int(in[0].size() / (size_t(batch) * length * width));
  const int32_t* offsets = offset_given_ ? in[1].data<int32_t>() : nullptr;
  const int step = offset_given_ && in[1].size() > 1 ? 1 : 0;
  const float* periods = int(in.size()) > at ? in[at].data<float>() : nullptr;
  const Scratch memory(kept, size_t(length + 1) * dims_);
  return [x = Rows(in[0]), y = out.data<float>(), half, length, width, batch, heads, offsets, step, periods,
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
  };
}

bool Attend::is_equivalent(const Primitive& other) const {
  auto& o = static_cast<const Attend&>(other);
  return scale_ == o.scale_ && causal_ == o.causal_ && mask_ == o.mask_ && sinks_ == o.sinks_;
}
Arrays Attend::plain(const Arrays& in) const {
  Optional mask = mask_ ? Optional(in[3]) : std::nullopt, sinks = sinks_ ? Optional(in.back()) : std::nullopt;
  return {mx::fast::scaled_dot_product_attention(in[0], in[1], in[2], scale_, causal_ ? "causal" : "", mask, sinks)};
}
Job Attend::prepare(const Arrays& in, array& out, Arrays& kept) const {
  Job fill;
  const array q = side_by_side(in[0], kept, fill), k = side_by_side(in[1], kept, fill), v = side_by_side(in[2], kept, fill);
  const int groups = k.shape(1), heads = q.shape(1) / groups, batch = q.shape(0);
  Attention a{};
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
  return [fill = std::move(fill), a, groups, heads, batch, steps, mask,
                    mask_batch, item = a.mask_is_bool ? 1 : 4, sinks, qp = q.data<float>(), kp = k.data<float>(),
                    vp = v.data<float>(), op = out.data<float>()] {
    if (fill) fill();
    attention(engine(), batch * groups, heads, a,
                      [&](int task) {
                        const int b = task / groups, g = task % groups;
                        Attention mine = a;
                        mine.q = qp + b * steps[0] + g * heads * a.q_head;
                        mine.k = kp + b * steps[1] + g * steps[4];
                        mine.v = vp + b * steps[2] + g * steps[5];
                        mine.out = op + b * steps[3] + g * heads * a.out_head;
                        mine.mask = mask ? mask + b * mask_batch + g * heads * a.mask_head * item : nullptr;
                        mine.sinks = sinks ? sinks + g * heads : nullptr;
                        return mine;
                      });
  };
}

Job Attend::prepare_cached(const Arrays& in, array& out, const Cache& keys, const Cache& values, const int* offset) const {
  const array &q = in[0], &k = in[1], &v = in[2];
  const int groups = k.shape(1), heads = q.shape(1) / groups;
  Attention a{};
  a.q_head = q.strides(1), a.q_row = q.strides(2), a.k_row = k.shape(3), a.v_row = v.shape(3);
  a.out_head = out.strides(1), a.out_row = out.strides(2);
  a.queries = 1, a.width = k.shape(3), a.value_width = v.shape(3), a.scale = scale_;
  const float* sinks = sinks_ ? in.back().data<float>() : nullptr;
  return [a, groups, heads, sinks, offset, &keys, &values, qp = q.data<float>(), op = out.data<float>()] {
    Attention now = a;
    now.keys = std::min(*offset + 1, keys.capacity);  // a rotating cache is full and stays so
    attention(engine(), groups, heads, now, [&](int g) {
      Attention mine = now;
      mine.q = qp + g * heads * now.q_head;
      mine.k = keys.rows + ptrdiff_t(g) * keys.capacity * now.k_row;
      mine.v = values.rows + ptrdiff_t(g) * values.capacity * now.v_row;
      mine.out = op + g * heads * now.out_head;
      mine.sinks = sinks ? sinks + g * heads : nullptr;
      return mine;
    });
  };
}

}  // namespace squizd
