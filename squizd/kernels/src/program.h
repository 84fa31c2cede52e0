// One token of a model as a list of jobs over fixed memory: what building and walking MLX's graph costs, over a thousand
// nodes a token, is paid once. Made from the graph of a real call, so it knows nothing of any model.
#pragma once
#include <condition_variable>
#include <mutex>
#include <unordered_map>

#include "primitives.h"
#include "shelf.h"

namespace squizd {

// In a graph that becomes a program: `fresh` [1, heads, 1, width] is appended to cache number `index`, and the result is
// all of that cache; or expert ids become slots of a shelf. Neither can be evaluated.
array cached(const array& fresh, int index);
array placed(const array& ids, std::shared_ptr<Shelf> shelf);
// An input of such a graph; what depends on it cannot be evaluated either.
array placeholder(const mx::Shape& shape, mx::Dtype dtype);

// What the experts of a layer will be, by the same operations as in that layer but on an earlier residual.
struct Guess {
  Arrays nodes;  // inputs before outputs; the last are the ids
  Optional scores;  // by which they are chosen
  std::shared_ptr<Shelf> shelf;
};

class Program {
 public:
  // `result` in terms of two placeholders, a token id and its position. Throws std::invalid_argument for a graph that holds
  // an operation which is not known here, or a cache used in another way than by attention.
  Program(const array& result, const array& token, const array& position, int caches);
  Program(const Program&) = delete;

  // [result, caches...] for a token at `position`, whose keys and values become row `row` of `caches` [1, heads, capacity, width]:
  // the first `position` + 1 rows are attended to, or all where there are not so many (a cache that rotates). Lazy.
  static Arrays step(const std::shared_ptr<Program>& program, const array& token, const Arrays& caches, int position, int row);

  size_t jobs() const { return jobs_.size(); }
  // Returns when no token is under way. What went wrong in one is left to whoever waits for its result.
  void wait();

 private:
  friend class Step;
  struct Ticket {  // as long as there is one, a token is under way
    explicit Ticket(std::shared_ptr<Program> of);
    ~Ticket();
    const std::shared_ptr<Program> program;
  };
  void run(const void* token, int position, int row, const std::vector<Attend::Cache>& caches, float* result);
  using Real = std::unordered_map<uintptr_t, array>;  // what stands for an array of the graph
  using Appended = std::unordered_map<uintptr_t, int>;  // which cache an array is
  void emit(const array& node, Real& real, Appended& appended, Job meanwhile = {});
  Job foresee(const Guess& guess, Real& real, Appended& appended);

  std::mutex running_, counting_;
  std::condition_variable ended_;
  int under_way_ = 0;
  std::vector<Job> jobs_;
  std::vector<array> kept_;  // owns all memory that the jobs use
  array token_, position_, result_;
  int row_ = 0;
  std::vector<Attend::Cache> caches_;
};

}  // namespace squizd
