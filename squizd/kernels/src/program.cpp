#include "program.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <unordered_set>

#include "elementary.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/transforms.h"
#include "operations.h"

namespace squizd {
namespace {

[[noreturn]] void only_traced() { throw std::runtime_error("this belongs to a program and cannot be evaluated"); }

class Traced : public mx::Primitive {
 public:
  using Primitive::Primitive;
  void eval_cpu(const Arrays&, Arrays&) override { only_traced(); }
  void eval_gpu(const Arrays&, Arrays&) override { only_traced(); }
};
class Cached : public Traced {
 public:
  Cached(mx::Stream s, int index) : Traced(s), index(index) {}
  const char* name() const override { return "SquizdCached"; }
  const int index;
};
class Placed : public Traced {
 public:
  Placed(mx::Stream s, std::shared_ptr<Shelf> shelf) : Traced(s), shelf(std::move(shelf)) {}
  const char* name() const override { return "SquizdPlaced"; }
  const std::shared_ptr<Shelf> shelf;
};

mx::Stream stream() {
  if (auto s = cpu_stream()) return *s;
  throw std::invalid_argument("programs run on the CPU only");
}

array scalar(mx::Dtype dtype, mx::Shape shape) {
  array a(std::move(shape), dtype, nullptr, {});
  a.set_data(mx::allocator::malloc(a.nbytes()));
  memset(a.data<char>(), 0, a.nbytes());
  a.set_status(array::Status::available);
  return a;
}

// In the thread that used it first MLX throws a stream's error also while it hands out work, and one time in ten has counted that work
// as under way by then, for good (0.32). Evaluations wait for some of what is under way when that seems to be more than ten tasks:
// after some failed tokens they waited for ever. So once a token has failed the count begins anew with every token. It counts too
// little then, by what is under way at that moment: MLX runs ahead a little further, and waits for nothing that is not there.
std::atomic<bool> failed{false};
void count_anew() {
  if (!failed.load()) return;
  const mx::Stream any = mx::default_stream(mx::Device::cpu);
  int n = mx::scheduler::n_active_tasks();
  for (; n > 0; n--) mx::scheduler::notify_task_completion(any);
  for (; n < 0; n++) mx::scheduler::notify_new_task(any);
}

// Every array that `result` is made of, inputs before outputs.
Arrays in_order(const array& result) {
  Arrays order;
  std::unordered_set<uintptr_t> seen{result.id()};
  std::vector<std::pair<array, size_t>> stack{{result, 0}};
  while (!stack.empty()) {
    auto& [node, next] = stack.back();
    if (node.has_primitive() && node.status() == array::Status::unscheduled && next < node.inputs().size()) {
      const array input = node.inputs()[next++];
      if (seen.insert(input.id()).second) stack.emplace_back(input, 0);
    } else {
      order.push_back(node);
      stack.pop_back();
    }
  }
  return order;
}

// By name, as the classes' type information is private to MLX's library.
bool is(const array& node, const char* operation) { return !strcmp(const_cast<array&>(node).primitive().name(), operation); }

const Placed* as_placed(const array& node) {
  return node.has_primitive() ? dynamic_cast<const Placed*>(&const_cast<array&>(node).primitive()) : nullptr;
}

// The operations from a sum (the residual) to the ids that a layer's router chooses; empty if the router depends on more than
// that one sum. The sum itself comes first.
Arrays router(const array& placed, const std::unordered_set<uintptr_t>& varies) {
  Arrays chain;
  for (array node = placed.inputs()[0];;) {
    chain.push_back(node);
    if (!node.has_primitive() || node.status() != array::Status::unscheduled || node.outputs().size() != 1) return {};
    std::unordered_set<uintptr_t> from;
    Optional input;
    for (const array& i : node.inputs())
      if (varies.count(i.id()) && from.insert(i.id()).second) input = i;
    if (!input) return {};
    if (from.size() > 1) break;
    node = *input;
  }
  if (!is(chain.back(), "Add")) return {};
  std::reverse(chain.begin(), chain.end());
  return chain;
}

// By layer of experts: a guess at the next one's choice, made of the residual that this one's router looks at.
std::unordered_map<uintptr_t, Guess> guesses(const Arrays& order, const std::unordered_set<uintptr_t>& varies) {
  std::unordered_map<uintptr_t, Guess> found;
  const array* before = nullptr;
  Arrays residual;  // and what follows, of the layer before
  for (const array& node : order) {
    const Placed* placed = as_placed(node);
    if (!placed) continue;
    const Arrays chain = router(node, varies);
    if (!chain.empty() && !residual.empty() && chain[0].shape() == residual[0].shape() && chain[0].dtype() == residual[0].dtype()) {
      std::unordered_map<uintptr_t, array> other{{chain[0].id(), residual[0]}};
      Guess guess{{}, {}, placed->shelf};
      for (size_t i = 1; i < chain.size(); i++) {
        Arrays inputs;
        for (const array& input : chain[i].inputs()) {
          const auto replaced = other.find(input.id());
          inputs.push_back(replaced == other.end() ? input : replaced->second);
        }
        guess.nodes.emplace_back(chain[i].shape(), chain[i].dtype(), chain[i].primitive_ptr(), std::move(inputs));
        other.emplace(chain[i].id(), guess.nodes.back());
      }
      for (const array& made : guess.nodes)
        if (is(made, "ArgPartition")) guess.scores = made.inputs()[0];
      if (guess.scores) found.emplace(before->id(), std::move(guess));
    }
    before = &node;
    residual = chain;
  }
  return found;
}

}  // namespace

array cached(const array& fresh, int index) {
  if (fresh.ndim() != 4 || fresh.shape(0) != 1 || fresh.shape(2) != 1 || fresh.dtype() != mx::float32)
    throw std::invalid_argument("a cache takes one position of float32 at a time");
  return array(fresh.shape(), fresh.dtype(), std::make_shared<Cached>(stream(), index), {fresh});
}
array placed(const array& ids, std::shared_ptr<Shelf> shelf) {
  array whole = ids.dtype() == mx::uint32 ? ids : mx::astype(ids, mx::uint32);
  return array(ids.shape(), mx::uint32, std::make_shared<Placed>(stream(), std::move(shelf)), {whole});
}
array placeholder(const mx::Shape& shape, mx::Dtype dtype) { return array(shape, dtype, nullptr, {}); }

Program::Program(const array& result, const array& token, const array& position, int caches)
    : token_(scalar(token.dtype(), token.shape())), position_(scalar(mx::int32, {})), result_(token_), caches_(size_t(caches)) {
  const Arrays order = in_order(result);
  std::unordered_set<uintptr_t> varies{token.id(), position.id()};
  Arrays constants;
  for (const array& node : order) {
    bool depends = varies.count(node.id());
    if (node.has_primitive() && node.status() == array::Status::unscheduled) {
      for (const array& input : node.inputs()) depends |= varies.count(input.id()) > 0;
      if (depends)
        for (const array& output : node.outputs()) varies.insert(output.id());
    }
    if (!depends) constants.push_back(node);
  }
  mx::eval(constants);
  Real real{{token.id(), token_}, {position.id(), position_}};
  for (const array& constant : constants) {
    real.emplace(constant.id(), constant);
    kept_.push_back(constant);
  }
  Appended appended;
  const auto ahead = guesses(order, varies);
  for (const array& node : order) {
    if (real.count(node.id())) continue;
    const auto guess = ahead.find(node.id());
    emit(node, real, appended, guess == ahead.end() ? Job() : foresee(guess->second, real, appended));
  }
  result_ = real.at(result.id());
  if (result_.dtype() != mx::float32 || !result_.flags().row_contiguous) throw std::invalid_argument("the result is no row of float32");
}

// A job for the time in which a layer's experts are waited for: guess at those of the next, if that pays, and announce them.
Job Program::foresee(const Guess& guess, Real& real, Appended& appended) {
  std::vector<Job> jobs;
  jobs_.swap(jobs);
  for (const array& node : guess.nodes) emit(node, real, appended);
  jobs_.swap(jobs);
  const array scores = real.at(guess.scores->id());
  if (scores.dtype() != mx::float32 || !scores.flags().row_contiguous || scores.size() != size_t(guess.shelf->experts()))
    throw std::invalid_argument("a router's scores are no row of float32");
  return [jobs = std::move(jobs), shelf = guess.shelf, ids = Ids(real.at(guess.nodes.back().id())), scores = scores.data<float>()] {
    if (!shelf->foresight().wanted()) return;
    for (const Job& job : jobs) job();
    thread_local std::vector<uint32_t> copy, ranked;
    const uint32_t* chosen = ids.list(copy, shelf->experts(), "expert");
    ranked.assign(chosen, chosen + ids.count);
    // Some routers take the least of negated scores: the likeliest is at the same end as all that are chosen.
    const float* most = std::max_element(scores, scores + shelf->experts());
    const bool falling = std::find(ranked.begin(), ranked.end(), uint32_t(most - scores)) != ranked.end();
    std::sort(ranked.begin(), ranked.end(), [&](uint32_t a, uint32_t b) { return falling ? scores[a] > scores[b] : scores[a] < scores[b]; });
    shelf->expect(ranked.data(), int(ranked.size()));
  };
}

void Program::emit(const array& node, Real& real, Appended& appended, Job meanwhile) {
  mx::Primitive& primitive = const_cast<array&>(node).primitive();
  Arrays in, outs;
  bool from_cache = false;
  for (const array& input : node.inputs()) {
    in.push_back(real.at(input.id()));
    from_cache |= appended.count(input.id()) > 0;
  }
  const Arrays outputs = node.outputs();
  for (const array& output : outputs) outs.emplace_back(output.shape(), output.dtype(), nullptr, Arrays{});
  auto* attend = dynamic_cast<Attend*>(&primitive);
  if (from_cache && !attend) throw std::invalid_argument(std::string("a cache is used by ") + primitive.name());

  Job job;
  if (auto* cache = dynamic_cast<Cached*>(&primitive)) {
    if (cache->index < 0 || size_t(cache->index) >= caches_.size()) throw std::invalid_argument("no such cache");
    appended[node.id()] = cache->index;
    const array fresh = in[0];
    outs[0] = fresh;  // attention looks at its shape only
    job = [to = &caches_[size_t(cache->index)], from = fresh.data<float>(), heads = fresh.shape(1), width = fresh.shape(3),
           head = fresh.strides(1), step = fresh.strides(3), at = &row_] {
      for (int h = 0; h < heads; h++) {
        float* row = to->rows + (ptrdiff_t(h) * to->capacity + *at) * width;
        if (step == 1) memcpy(row, from + h * head, size_t(width) * sizeof(float));
        else
          for (int d = 0; d < width; d++) row[d] = from[h * head + d * step];
      }
    };
  } else if (auto* place = dynamic_cast<Placed*>(&primitive)) {
    outs[0].set_data(mx::allocator::malloc(outs[0].nbytes()));
    job = [shelf = place->shelf, ids = Ids(in[0]), to = outs[0].data<uint32_t>(), meanwhile = std::move(meanwhile)] {
      thread_local std::vector<uint32_t> copy;
      shelf->place(ids.list(copy, shelf->experts(), "expert"), ids.count, to, *machine().pool, meanwhile);
    };
  } else if (attend && from_cache) {
    const auto keys = appended.find(node.inputs()[1].id()), values = appended.find(node.inputs()[2].id());
    if (attend->masked() || keys == appended.end() || values == appended.end() || in[0].strides(3) != 1)
      throw std::invalid_argument("a cache is used by attention of another kind");
    outs[0].set_data(mx::allocator::malloc(outs[0].nbytes()));
    job = attend->prepare_cached(in, outs[0], caches_[size_t(keys->second)], caches_[size_t(values->second)], position_.data<int>());
  } else if (auto* ours = dynamic_cast<Replacement*>(&primitive)) {
    outs[0].set_data(mx::allocator::malloc(outs[0].nbytes()));
    job = ours->prepare(in, outs[0], kept_);
  } else if (!elementary(primitive, in, outs, job, kept_)) {
    throw std::invalid_argument(std::string("it uses ") + primitive.name());
  }
  if (job) jobs_.push_back(std::move(job));
  for (size_t i = 0; i < outs.size(); i++) {
    outs[i].set_status(array::Status::available);
    real.emplace(outputs[i].id(), outs[i]);
    kept_.push_back(outs[i]);
  }
}

Program::Ticket::Ticket(std::shared_ptr<Program> of) : program(std::move(of)) {
  std::lock_guard lock(program->counting_);
  program->under_way_++;
}
Program::Ticket::~Ticket() {
  std::lock_guard lock(program->counting_);
  if (!--program->under_way_) program->ended_.notify_all();
}
void Program::wait() {
  std::unique_lock lock(counting_);
  ended_.wait(lock, [this] { return !under_way_; });
  count_anew();
}

void Program::run(const void* token, int position, int row, const std::vector<Attend::Cache>& caches, float* result) {
  std::lock_guard alone(running_);
  memcpy(token_.data<char>(), token, token_.nbytes());
  *position_.data<int>() = position;
  row_ = row;
  caches_ = caches;
  try {
    for (const Job& job : jobs_) job();
  } catch (...) {  // MLX tells whoever waits; nobody shall take what lies here for a result
    failed = true;
    std::fill_n(result, result_.size(), std::numeric_limits<float>::quiet_NaN());
    throw;
  }
  memcpy(result, result_.data<float>(), result_.nbytes());
}

// A cache that nobody else holds: the array itself where that is so already, else a copy. An operation of its own because
// MLX gives away the inputs of operations with one output only.
class Own : public mx::Primitive {
 public:
  using Primitive::Primitive;
  const char* name() const override { return "SquizdOwn"; }
  void eval_gpu(const Arrays&, Arrays&) override { only_traced(); }
  void eval_cpu(const Arrays& in, Arrays& outputs) override {
    array& out = outputs[0];
    if (in[0].is_donatable() && in[0].flags().row_contiguous) return out.copy_shared_buffer(in[0]);
    out.set_data(mx::allocator::malloc(out.nbytes()));
    Job job;
    if (in[0].flags().row_contiguous) job = [from = in[0].data<char>(), to = out.data<char>(), n = out.nbytes()] { memcpy(to, from, n); };
    else job = copy_of(in[0], out);
    mx::cpu::get_command_encoder(stream()).dispatch(std::move(job));
  }
};

class Step : public mx::Primitive {
 public:
  Step(mx::Stream s, std::shared_ptr<Program> program, int position, int row)
      : Primitive(s), program_(std::move(program)), position_(position), row_(row) {}
  const char* name() const override { return "SquizdStep"; }
  void eval_gpu(const Arrays&, Arrays&) override { only_traced(); }

  void eval_cpu(const Arrays& in, Arrays& outputs) override {
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    std::vector<Attend::Cache> caches;
    for (size_t i = 1; i < in.size(); i++) {
      outputs[i].copy_shared_buffer(in[i]);
      caches.push_back({outputs[i].data<float>(), outputs[i].shape(2)});
    }
    mx::cpu::get_command_encoder(stream()).dispatch([ticket = std::make_shared<Program::Ticket>(program_), token = in[0].data<char>(),
                                                     position = position_, row = row_, caches = std::move(caches),
                                                     result = outputs[0].data<float>()] {
      ticket->program->run(token, position, row, caches, result);
    });
  }

 private:
  std::shared_ptr<Program> program_;
  int position_, row_;
};

Arrays Program::step(const std::shared_ptr<Program>& program, const array& token, const Arrays& caches, int position, int row) {
  if (caches.size() != program->caches_.size() || token.size() != program->token_.size() || token.dtype() != program->token_.dtype())
    throw std::invalid_argument("not the inputs of this program");
  count_anew();
  Arrays in{dense(token)};
  std::vector<mx::Shape> shapes{program->result_.shape()};
  for (const array& cache : caches) {
    if (cache.ndim() != 4 || row < 0 || row > position || row >= cache.shape(2) || cache.dtype() != mx::float32)
      throw std::invalid_argument("no room in a cache");
    in.emplace_back(cache.shape(), cache.dtype(), std::make_shared<Own>(stream()), Arrays{cache});
    shapes.push_back(cache.shape());
  }
  return array::make_arrays(std::move(shapes), std::vector<mx::Dtype>(in.size(), mx::float32),
                            std::make_shared<Step>(stream(), program, position, row), in);
}

}  // namespace squizd
