#include "shelf.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <mutex>
#include <stdexcept>

#include "hash.h"

namespace squizd {
namespace {

float half(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  uint32_t out;
  float f;
  if (exponent == 0) {  // zero and subnormal: exact in float32
    f = float(mantissa) * 0x1p-24f;
    memcpy(&out, &f, 4);
    out |= sign;
  } else {
    out = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  memcpy(&f, &out, 4);
  return f;
}

std::mutex failure_lock;
std::deque<Failure> failures;  // the last few: several tokens under way may fail before one is reported

void widen(const uint8_t* stored, size_t size, Widen how, uint8_t* to) {
  for (size_t i = 0; i + 2 <= size; i += 2, to += 4) {
    uint16_t bits;
    memcpy(&bits, stored + i, 2);
    if (how == FROM_BF16) {
      const uint32_t wide = uint32_t(bits) << 16;
      memcpy(to, &wide, 4);
    } else {
      const float wide = half(bits);
      memcpy(to, &wide, 4);
    }
  }
}

}  // namespace

Failure last_failure() {
  std::lock_guard lock(failure_lock);
  return failures.empty() ? Failure{} : failures.back();
}

Failure failure_of(const std::string& message) {
  std::lock_guard lock(failure_lock);
  for (auto f = failures.rbegin(); f != failures.rend(); ++f)
    if (f->message == message) return *f;
  return {};
}

uint64_t xxh64(const uint8_t* data, size_t size) {
  Hash hash;
  hash.add(data, size);
  return hash.digest();
}

Shelf::Shelf(std::string name, int fd, int layer, std::vector<Part> parts, std::vector<Extent> records, int slots,
             std::vector<uint64_t> steps)
    : name_(std::move(name)), fd_(fd), layer_(layer), slots_(slots), parts_(std::move(parts)), records_(std::move(records)),
      slot_of_(records_.size(), -1), expert_in_(size_t(slots), -1), used_(size_t(slots), 0), steps_(std::move(steps)),
      weights_(records_.size(), 0) {
  if (steps_.empty()) throw std::invalid_argument("a half-life of no tokens");
  size_t end = 0;
  for (const Part& part : parts_) {
    if (part.offset < end) throw std::invalid_argument("parts overlap");
    staged_ += part.offset - end + (part.widen ? part.size : 0);
    end = part.offset + part.size;
  }
  size_t tail = 0;
  for (const Extent& record : records_) {
    if (record.size < end) throw std::invalid_argument("a record is shorter than its parts");
    tail = std::max(tail, size_t(record.size) - end);
  }
  staged_ += tail;
}

bool Shelf::read(int expert, int slot, std::vector<uint8_t>& staging, std::string& error) const {
  const Extent& record = records_[size_t(expert)];
  if (staging.size() < staged_) staging.resize(staged_);
  std::vector<iovec> pieces;
  size_t end = 0, held = 0;
  auto stage = [&](size_t size) {
    if (size) pieces.push_back({staging.data() + held, size});
    held += size;
  };
  for (const Part& part : parts_) {
    stage(part.offset - end);
    if (part.widen) stage(part.size);
    else if (part.size) pieces.push_back({part.bank + part.row_bytes * size_t(slot), part.size});
    end = part.offset + part.size;
  }
  stage(size_t(record.size) - end);

  const std::vector<iovec> wanted = pieces;
  uint64_t got = 0;
  for (size_t first = 0; got < record.size;) {
    const ssize_t n = preadv(fd_, pieces.data() + first, int(std::min<size_t>(pieces.size() - first, 512)), off_t(record.offset + got));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return error = strerror(errno), false;
    if (n == 0) return error = std::to_string(got) + " of " + std::to_string(record.size) + " bytes, the file is cut short", false;
    got += uint64_t(n);
    for (size_t rest = size_t(n); rest && first < pieces.size();) {
      const size_t take = std::min(rest, pieces[first].iov_len);
      pieces[first].iov_base = static_cast<char*>(pieces[first].iov_base) + take;
      pieces[first].iov_len -= take;
      rest -= take;
      if (!pieces[first].iov_len) first++;
    }
  }
  Hash hash;
  for (const iovec& piece : wanted) hash.add(static_cast<const uint8_t*>(piece.iov_base), piece.iov_len);
  if (hash.digest() != record.digest) return error = "the bytes do not match their digest", false;

  end = held = 0;
  for (const Part& part : parts_) {
    held += part.offset - end;
    if (part.widen) {
      widen(staging.data() + held, part.size, part.widen, part.bank + part.row_bytes * size_t(slot));
      held += part.size;
    }
    end = part.offset + part.size;
  }
  return true;
}

void Shelf::weigh(const uint32_t* ids, int count) {
  for (int i = 0; i < count; i++) weights_[ids[i]] += steps_[size_t(token_)];
  if (++token_ < int(steps_.size())) return;
  token_ = 0;
  for (uint64_t& weight : weights_) weight >>= 1;
}

// Whether what lies in `slot` is given up before what lies in `other`. An empty slot comes before all.
bool Shelf::goes_before(int slot, int other) const {
  const int a = expert_in_[size_t(slot)], b = expert_in_[size_t(other)];
  if (a < 0 || b < 0) return b >= 0;
  const uint64_t one = weights_[size_t(a)], two = weights_[size_t(b)];
  return one != two ? one < two : a < b;
}

void Shelf::place(const uint32_t* ids, int count, uint32_t* slots, Pool& pool) {
  std::vector<std::pair<int, int>> missing;  // expert, slot
  const uint64_t now = ++clock_;
  for (int i = 0; i < count; i++) {
    if (ids[i] >= records_.size())
      throw std::out_of_range(name_ + ": the router chose expert " + std::to_string(int32_t(ids[i])) + "; there are " +
                              std::to_string(records_.size()));
    const int slot = slot_of_[ids[i]];
    if (slot < 0) continue;
    counts_.hits += used_[size_t(slot)] != now;
    used_[size_t(slot)] = now;
  }
  weigh(ids, count);
  for (int i = 0; i < count; i++) {
    const int expert = int(ids[i]);
    if (slot_of_[size_t(expert)] >= 0) continue;
    int victim = -1;
    for (int s = 0; s < slots_; s++)
      if (used_[size_t(s)] != now && (victim < 0 || goes_before(s, victim))) victim = s;
    if (victim < 0) throw std::runtime_error(name_ + ": more experts are needed at once than there are slots");
    int& before = expert_in_[size_t(victim)];
    if (before >= 0) slot_of_[size_t(before)] = -1, counts_.evictions++;
    before = expert;
    slot_of_[size_t(expert)] = victim;
    used_[size_t(victim)] = now;
    missing.emplace_back(expert, victim);
  }
  if (!missing.empty()) {
    const auto began = std::chrono::steady_clock::now();
    std::vector<std::string> errors(missing.size());
    if (int(staging_.size()) < pool.workers()) staging_.resize(size_t(pool.workers()));
    pool.run(int(missing.size()), false, [&](int task, int worker) {
      const auto [expert, slot] = missing[size_t(task)];
      if (!read(expert, slot, staging_[size_t(worker)], errors[size_t(task)]) && errors[size_t(task)].empty()) errors[size_t(task)] = "?";
    });
    counts_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    Failure first;
    for (size_t i = 0; i < missing.size(); i++) {
      const auto [expert, slot] = missing[i];
      const Extent& record = records_[size_t(expert)];
      if (errors[i].empty()) {
        counts_.misses++;
        counts_.bytes += record.size;
        continue;
      }
      slot_of_[size_t(expert)] = expert_in_[size_t(slot)] = -1;
      used_[size_t(slot)] = 0;
      if (first.path.empty()) first = {"", name_, errors[i], layer_, expert, record.offset};
    }
    if (!first.path.empty()) {
      first.message = name_ + ": layer " + std::to_string(layer_) + " expert " + std::to_string(first.expert) + " at byte " +
                      std::to_string(first.offset) + ": " + first.reason;
      std::lock_guard lock(failure_lock);
      failures.push_back(first);
      if (failures.size() > 16) failures.pop_front();
      throw std::runtime_error(first.message);
    }
  }
  for (int i = 0; i < count; i++) slots[i] = uint32_t(slot_of_[ids[i]]);
}

std::vector<std::pair<int, int>> Shelf::order() const {
  std::vector<std::pair<int, int>> out;
  for (int s = 0; s < slots_; s++)
    if (expert_in_[size_t(s)] >= 0) out.emplace_back(expert_in_[size_t(s)], s);
  std::sort(out.begin(), out.end(), [&](auto& a, auto& b) { return goes_before(a.second, b.second); });
  return out;
}

void Shelf::arrange(const std::vector<std::pair<int, int>>& order, const std::vector<uint64_t>& weights, int token) {
  if (weights.size() != weights_.size() || token < 0 || token >= int(steps_.size()))
    throw std::invalid_argument("one weight for each expert, and a token of the half-life");
  weights_ = weights;
  token_ = token;
  std::fill(slot_of_.begin(), slot_of_.end(), -1);
  std::fill(expert_in_.begin(), expert_in_.end(), -1);
  std::fill(used_.begin(), used_.end(), 0);
  for (auto [expert, slot] : order) {
    if (expert < 0 || expert >= experts() || slot < 0 || slot >= slots_) throw std::out_of_range("no such expert or slot");
    slot_of_[size_t(expert)] = slot;
    expert_in_[size_t(slot)] = expert;
    used_[size_t(slot)] = ++clock_;
  }
}

Shelf::Counts Shelf::take_counts() {
  Counts out = counts_;
  counts_ = {};
  return out;
}

}  // namespace squizd
