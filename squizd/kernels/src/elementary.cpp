#include "elementary.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <set>
#include <stdexcept>

#include "mlx/backend/cpu/binary_ops.h"
#include "mlx/backend/cpu/unary_ops.h"

namespace squizd {
namespace {

namespace ops = mx::detail;

void allocate(array& out) { out.set_data(mx::allocator::malloc(out.nbytes())); }

// Where the elements of `a` lie, in order; nothing if they lie one after another.
std::vector<int> places(const array& a) {
  std::vector<int> out;
  if (a.flags().row_contiguous) return out;
  out.resize(a.size());
  for (size_t i = 0; i < out.size(); i++) {
    int64_t at = 0;
    size_t rest = i;
    for (int d = int(a.ndim()) - 1; d >= 0; d--) {
      at += int64_t(rest % a.shape(d)) * a.strides(d);
      rest /= a.shape(d);
    }
    out[i] = int(at);
  }
  return out;
}

struct Reader {
  std::vector<int> at;
  explicit Reader(const array& a) : at(places(a)) {}
  size_t operator()(size_t i) const { return at.empty() ? i : size_t(at[i]); }
};

template <class From, class To, class F>
Job map1(const array& a, array& out, F f) {
  return [from = a.data<From>(), to = out.data<To>(), n = out.size(), at = Reader(a), f]() mutable {
    for (size_t i = 0; i < n; i++) to[i] = f(from[at(i)]);
  };
}
template <class From, class To, class F>
Job map2(const array& a, const array& b, array& out, F f) {
  const bool even = a.flags().row_contiguous && b.flags().row_contiguous;
  if (even)
    return [x = a.data<From>(), y = b.data<From>(), to = out.data<To>(), n = out.size(), f]() mutable {
      for (size_t i = 0; i < n; i++) to[i] = f(x[i], y[i]);
    };
  return [x = a.data<From>(), y = b.data<From>(), to = out.data<To>(), n = out.size(), p = Reader(a), q = Reader(b), f]() mutable {
    for (size_t i = 0; i < n; i++) to[i] = f(x[p(i)], y[q(i)]);
  };
}

template <class F>
bool with_type(mx::Dtype dtype, F f) {
  if (dtype == mx::float32) return f(float()), true;
  if (dtype == mx::int32) return f(int32_t()), true;
  if (dtype == mx::uint32) return f(uint32_t()), true;
  if (dtype == mx::bool_) return f(bool()), true;
  return false;
}

bool arithmetic(const std::string& name, const Arrays& in, array& out, Job& job) {
  if (in[0].dtype() != mx::float32) return false;
#define UNARY(op) \
  if (name == #op) return allocate(out), job = map1<float, float>(in[0], out, ops::op{}), true;
#define BINARY(op) \
  if (name == #op) return allocate(out), job = map2<float, float>(in[0], in[1], out, ops::op{}), true;
#define COMPARE(op) \
  if (name == #op) return allocate(out), job = map2<float, bool>(in[0], in[1], out, ops::op{}), true;
  BINARY(Add) BINARY(Subtract) BINARY(Multiply) BINARY(Divide) BINARY(Maximum) BINARY(Minimum) BINARY(Power)
  COMPARE(Greater) COMPARE(GreaterEqual) COMPARE(Less) COMPARE(LessEqual)
  UNARY(Negative) UNARY(Exp) UNARY(Log) UNARY(Log1p) UNARY(Sigmoid) UNARY(Tanh) UNARY(Sqrt) UNARY(Rsqrt) UNARY(Square) UNARY(Abs) UNARY(Erf)
#undef UNARY
#undef BINARY
#undef COMPARE
  return false;
}

Job softmax(const array& a, array& out) {
  const int width = a.shape(-1);
  return [from = a.data<float>(), to = out.data<float>(), rows = int(a.size() / width), width] {
    using One = mx::simd::Simd<float, 1>;
    for (int r = 0; r < rows; r++) {
      const float* x = from + size_t(r) * width;
      float *y = to + size_t(r) * width, top = *std::max_element(x, x + width), total = 0;
      for (int i = 0; i < width; i++) total += y[i] = mx::simd::exp(One(x[i] - top)).value;
      const float factor = 1 / total;
      for (int i = 0; i < width; i++) y[i] *= factor;
    }
  };
}

// One axis only: several are added in blocks, in an order that depends on strides.
template <class F>
Job reduce(const array& a, array& out, int axis, F f) {
  const int length = a.shape(axis);
  std::vector<int> first;  // of each element of `out`
  mx::Shape shape = a.shape();
  shape[axis] = 1;
  for (size_t i = 0; i < out.size(); i++) {
    int64_t at = 0;
    size_t rest = i;
    for (int d = int(a.ndim()) - 1; d >= 0; d--) {
      at += int64_t(rest % shape[d]) * a.strides(d);
      rest /= shape[d];
    }
    first.push_back(int(at));
  }
  return [from = a.data<float>(), to = out.data<float>(), first = std::move(first), length, step = a.strides(axis), f] {
    for (size_t i = 0; i < first.size(); i++) {
      const float* x = from + first[i];
      float total = x[0];
      for (int k = 1; k < length; k++) total = f(total, x[k * step]);
      to[i] = total;
    }
  };
}

template <class Arrange>
Job arrange(const array& a, array& out, Arrange arrange) {
  const int width = a.shape(-1);
  return [from = a.data<float>(), to = out.data<uint32_t>(), rows = int(a.size() / width), width, arrange] {
    for (int r = 0; r < rows; r++) {
      const float* x = from + size_t(r) * width;
      uint32_t* ids = to + size_t(r) * width;
      std::iota(ids, ids + width, 0u);
      arrange(ids, ids + width, [x](uint32_t p, uint32_t q) {
        if (std::isnan(x[p])) return false;
        return std::isnan(x[q]) || x[p] < x[q] || (x[p] == x[q] && p < q);
      });
    }
  };
}

template <class Id>
Job gather_axis(const array& a, const array& ids, array& out, int axis) {
  std::vector<int> base;
  for (size_t i = 0; i < out.size(); i++) {
    int64_t at = 0;
    size_t rest = i;
    for (int d = int(out.ndim()) - 1; d >= 0; d--) {
      if (d != axis) at += int64_t(rest % out.shape(d)) * a.strides(d);
      rest /= out.shape(d);
    }
    base.push_back(int(at));
  }
  return [from = a.data<float>(), which = ids.data<Id>(), to = out.data<float>(), base = std::move(base), place = Reader(ids),
          step = a.strides(axis), count = a.shape(axis)] {
    for (size_t i = 0; i < base.size(); i++) {
      int64_t id = which[place(i)];
      if (id < 0) id += count;
      if (id < 0 || id >= count) throw std::out_of_range("an index lies outside its axis");
      to[i] = from[base[i] + id * step];
    }
  };
}

template <class T>
Job concatenate(const Arrays& in, array& out, int axis) {
  std::vector<std::pair<const T*, std::pair<std::vector<int>, std::vector<int>>>> parts;  // from where to where
  int64_t start = 0;
  for (const array& a : in) {
    std::vector<int> from, to;
    Reader at(a);
    for (size_t i = 0; i < a.size(); i++) {
      int64_t place = start * out.strides(axis);
      size_t rest = i;
      for (int d = int(a.ndim()) - 1; d >= 0; d--) {
        place += int64_t(rest % a.shape(d)) * out.strides(d);
        rest /= a.shape(d);
      }
      from.push_back(int(at(i)));
      to.push_back(int(place));
    }
    start += a.shape(axis);
    parts.emplace_back(a.data<T>(), std::pair(std::move(from), std::move(to)));
  }
  return [parts = std::move(parts), to = out.data<T>()] {
    for (auto& [source, lists] : parts)
      for (size_t i = 0; i < lists.first.size(); i++) to[lists.second[i]] = source[lists.first[i]];
  };
}

// A row-contiguous array of the same elements, and the job that fills it.
bool copied(const array& a, array& out, Job& job) {
  allocate(out);
  return with_type(a.dtype(), [&](auto tag) {
    using T = decltype(tag);
    job = map1<T, T>(a, out, [](T x) { return x; });
  });
}

int axis_of(int axis, const array& a) { return axis < 0 ? axis + int(a.ndim()) : axis; }

}  // namespace

Job copy_of(const array& a, array& out) {
  return map1<float, float>(a, out, [](float x) { return x; });
}

bool elementary(mx::Primitive& p, const Arrays& in, Arrays& outs, Job& job, Arrays& kept) {
  static const std::set<std::string> VIEWS{"Transpose", "ExpandDims", "Squeeze", "Broadcast", "BroadcastAxes", "StopGradient", "Slice", "Split", "Copy"};
  static const std::set<std::string> RESHAPES{"Reshape", "Flatten", "Unflatten"};
  const std::string name = p.name();
  array& out = outs[0];
  if (out.size() > (1u << 20)) return false;  // lists of places would be too long
  if (VIEWS.count(name)) {
    p.eval_cpu(in, outs);
    return true;
  }
  if (RESHAPES.count(name) || name == "Contiguous") {
    Arrays whole{in[0]};
    if (!in[0].flags().row_contiguous) {
      array copy(in[0].shape(), in[0].dtype(), nullptr, {});
      if (!copied(in[0], copy, job)) return false;
      kept.push_back(copy);
      whole[0] = copy;
    }
    if (name == "Contiguous") return out.copy_shared_buffer(whole[0]), true;
    p.eval_cpu(whole, outs);
    return true;
  }
  if (name == "AsType") {
    allocate(out);
    bool known = false;
    with_type(in[0].dtype(), [&](auto from) {
      with_type(out.dtype(), [&](auto to) {
        using From = decltype(from);
        using To = decltype(to);
        job = map1<From, To>(in[0], out, [](From x) { return static_cast<To>(x); });
        known = true;
      });
    });
    return known;
  }
  if (outs.size() != 1) return false;
  if (name == "Concatenate") {
    allocate(out);
    const int axis = axis_of(static_cast<mx::Concatenate&>(p).state(), out);
    return with_type(out.dtype(), [&](auto tag) { job = concatenate<decltype(tag)>(in, out, axis); });
  }
  if (name == "Select") {
    if (out.dtype() != mx::float32 || in[0].dtype() != mx::bool_) return false;
    allocate(out);
    job = [c = in[0].data<bool>(), x = in[1].data<float>(), y = in[2].data<float>(), to = out.data<float>(), n = out.size(),
           pc = Reader(in[0]), px = Reader(in[1]), py = Reader(in[2])] {
      for (size_t i = 0; i < n; i++) to[i] = c[pc(i)] ? x[px(i)] : y[py(i)];
    };
    return true;
  }
  if (in.empty() || in[0].dtype() != mx::float32) return false;
  const bool last = in[0].flags().row_contiguous;  // rows along the last axis
  if (name == "Softmax") {
    if (!last) return false;
    return allocate(out), job = softmax(in[0], out), true;
  }
  if (name == "Sum" || name == "Max" || name == "Min") {
    std::vector<int> axes;
    for (int axis : static_cast<mx::Reduce&>(p).state().second)
      if (in[0].shape(axis) > 1) axes.push_back(axis);
    if (axes.size() != 1 || out.dtype() != mx::float32) return false;
    allocate(out);
    if (name == "Sum") job = reduce(in[0], out, axis_of(axes[0], in[0]), [](float a, float b) { return a + b; });
    if (name == "Max") job = reduce(in[0], out, axis_of(axes[0], in[0]), [](float a, float b) { return ops::Maximum{}(b, a); });
    if (name == "Min") job = reduce(in[0], out, axis_of(axes[0], in[0]), [](float a, float b) { return ops::Minimum{}(b, a); });
    return true;
  }
  if (name == "ArgPartition" || name == "ArgSort") {
    const bool sort = name == "ArgSort";
    auto [kth, axis] = sort ? std::pair(0, static_cast<mx::ArgSort&>(p).state()) : static_cast<mx::ArgPartition&>(p).state();
    if (!last || axis_of(axis, in[0]) != int(in[0].ndim()) - 1) return false;
    allocate(out);
    if (kth < 0) kth += in[0].shape(-1);
    if (sort) job = arrange(in[0], out, [](auto first, auto end, auto less) { std::stable_sort(first, end, less); });
    else job = arrange(in[0], out, [kth = kth](auto first, auto end, auto less) { std::nth_element(first, first + kth, end, less); });
    return true;
  }
  if (name == "GatherAxis") {
    const int axis = axis_of(static_cast<mx::GatherAxis&>(p).state(), in[0]);
    allocate(out);
    if (in[1].dtype() == mx::uint32) return job = gather_axis<uint32_t>(in[0], in[1], out, axis), true;
    if (in[1].dtype() == mx::int32) return job = gather_axis<int32_t>(in[0], in[1], out, axis), true;
    return false;
  }
  if (name == "Gather") {  // rows of a table
    auto [axes, sizes] = static_cast<mx::Gather&>(p).state();
    if (in.size() != 2 || axes != std::vector<int>{0} || sizes[0] != 1 || !last || !in[1].flags().row_contiguous) return false;
    if (in[1].dtype() != mx::uint32 && in[1].dtype() != mx::int32) return false;
    for (size_t d = 1; d < sizes.size(); d++)
      if (sizes[d] != in[0].shape(d)) return false;
    allocate(out);
    job = [from = in[0].data<float>(), ids = in[1].data<int32_t>(), n = in[1].size(), rows = in[0].shape(0), to = out.data<float>(),
           width = in[0].size() / in[0].shape(0)] {
      for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= rows) throw std::out_of_range("a row lies outside its table");
        memcpy(to + i * width, from + size_t(ids[i]) * width, width * sizeof(float));
      }
    };
    return true;
  }
  return arithmetic(name, in, out, job);
}

}  // namespace squizd
