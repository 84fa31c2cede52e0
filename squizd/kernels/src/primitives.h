// The operations as MLX primitives: inputs are read in place, outputs and scratch come from MLX's allocator, work runs
// in order on MLX's CPU stream.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "work.h"

namespace squizd {

namespace mx = mlx::core;
using mx::array;
using Arrays = std::vector<array>;
using Optional = std::optional<array>;
using Job = std::function<void()>;

struct Machine {
  std::unique_ptr<Pool> pool = std::make_unique<Pool>(1);
  const Arithmetic* math = nullptr;
  Machine();
};
Machine& machine();
inline Engine engine() { return {*machine().pool, *machine().math}; }

// A primitive that can be replaced by MLX's own operations, which serve gradients and vmap.
class Replacement : public mx::Primitive {
 public:
  using Primitive::Primitive;
  virtual Arrays plain(const Arrays& inputs) const = 0;

  // The work of one evaluation: inputs are evaluated, `out` has its memory. The job may run any number of times
  // while these, and what was added to `kept`, live.
  virtual Job prepare(const Arrays& in, array& out, Arrays& kept) const = 0;

  void eval_cpu(const Arrays& in, Arrays& outputs) final;
  void eval_gpu(const Arrays&, Arrays&) override { throw std::runtime_error("squizd's kernels run on the CPU only"); }
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;

 protected:
  mx::Stream here() const { return const_cast<Replacement*>(this)->stream(); }
};

// Expert ids in order, checked: an id that is no expert must not reach the arithmetic.
struct Ids {
  const uint32_t* base;
  mx::Shape shape;
  mx::Strides strides;
  bool even;
  int count;

  explicit Ids(const array& a);
  // Throws std::out_of_range for an id that is not below `experts`.
  const uint32_t* list(std::vector<uint32_t>& copy, int experts, const char* what = "expert slot") const;
};

// How the weights of one layer are stored; their arrays are a primitive's inputs from some place on.
struct Stored {
  int bits = 32, group = 0;
  Mode mode = FLOATS;

  int arrays() const { return mode == AFFINE ? 3 : mode == MXFP4 ? 2 : 1; }
  int cols(const array& w) const { return int(int64_t(w.shape(-1)) * 32 / bits); }
  std::string name() const { return mode == MXFP4 ? "mxfp4" : "affine"; }
  Matrix matrix(const Arrays& in, int at) const;
  Experts experts(const Arrays& in, int at) const { return {matrix(in, at), in[at].shape(0)}; }
  array plain(const array& x, const Arrays& in, int at) const;
  array plain_experts(const array& x, const array& ids, const Arrays& in, int at) const;
  bool operator==(const Stored&) const = default;
};

// x [..., width] times the rows of a matrix
class Linear : public Replacement {
 public:
  Linear(mx::Stream s, Stored as) : Replacement(s), as_(as) {}
  const char* name() const override { return "SquizdLinear"; }
  bool is_equivalent(const Primitive& other) const override { return as_ == static_cast<const Linear&>(other).as_; }
  Arrays plain(const Arrays& in) const override { return {as_.plain(in[0], in, 1)}; }
  Job prepare(const Arrays& in, array& out, Arrays& kept) const override;

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
  Job prepare(const Arrays& in, array& out, Arrays& kept) const override;

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
  Arrays plain(const Arrays& in) const override;
  Job prepare(const Arrays& in, array& out, Arrays& kept) const override;

 private:
  Stored gate_, up_, down_;
};

// Rows of a quantized table: ids [...] -> [..., cols]
class Embed : public Replacement {
 public:
  Embed(mx::Stream s, Stored as) : Replacement(s), as_(as) {}
  const char* name() const override { return "SquizdEmbed"; }
  bool is_equivalent(const Primitive& other) const override { return as_ == static_cast<const Embed&>(other).as_; }
  Arrays plain(const Arrays& in) const override;
  Job prepare(const Arrays& in, array& out, Arrays& kept) const override;

 private:
  Stored as_;
};

class RmsNorm : public Replacement {
 public:
  RmsNorm(mx::Stream s, float eps) : Replacement(s), eps_(eps) {}
  const char* name() const override { return "SquizdRmsNorm"; }
  bool is_equivalent(const Primitive& other) const override { return eps_ == static_cast<const RmsNorm&>(other).eps_; }
  Arrays plain(const Arrays& in) const override;
  Job prepare(const Arrays& in, array& out, Arrays& kept) const override;

 private:
  float eps_;
};

// x [batch, heads, length, width], offset: one integer or one per batch; frequencies: periods as mx.fast.rope takes them
class Rope : public Replacement {
 public:
  Rope(mx::Stream s, int dims, bool traditional, std::optional<float> base, float scale, int offset, bool given)
      : Replacement(s), dims_(dims), traditional_(traditional), base_(base), scale_(scale), offset_(offset), offset_given_(given) {}
  const char* name() const override { return "SquizdRope"; }
  bool is_equivalent(const Primitive& other) const override;
  Arrays plain(const Arrays& in) const override;
  Job prepare(const Arrays& in, array& out, Arrays& kept) const override;

 private:
  int dims_;
  bool traditional_;
  std::optional<float> base_;
  float scale_;
  int offset_;
  bool offset_given_;
};

// q [batch, heads, length, width], k and v [batch, key heads, keys, width], then a mask and sinks if there are any
class Attend : public Replacement {
 public:
  Attend(mx::Stream s, float scale, bool causal, bool mask, bool sinks)
      : Replacement(s), scale_(scale), causal_(causal), mask_(mask), sinks_(sinks) {}
  const char* name() const override { return "SquizdAttention"; }
  bool is_equivalent(const Primitive& other) const override;
  Arrays plain(const Arrays& in) const override;
  Job prepare(const Arrays& in, array& out, Arrays& kept) const override;

  // The same for one new position, whose keys and values are rows of a cache: see Cache.
  struct Cache {
    float* rows = nullptr;  // [key heads, capacity, width]
    int capacity = 0;
  };
  Job prepare_cached(const Arrays& in, array& out, const Cache& keys, const Cache& values, const int* offset) const;
  bool masked() const { return mask_; }

 private:
  float scale_;
  bool causal_, mask_, sinks_;
};

}  // namespace squizd
