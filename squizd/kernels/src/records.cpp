#include "records.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>

#include <algorithm>
#include <stdexcept>

#include "codes.h"
#include "hash.h"

namespace squizd {
namespace {

constexpr size_t PIECE = 512 << 10;  // read at once: still in the processor's cache when it is hashed
constexpr size_t STAGED = 64 << 10;  // the most of it that goes through a buffer, on the stack
constexpr size_t MOST_BUFFERS = 512;

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

// Stored bytes that are widened together, and what they become.
size_t unit(const Part& part) { return part.widen == CODES ? size_t(part.narrow) : part.widen ? 2 : 1; }
size_t widened(const Part& part, size_t size) {
  return part.widen == CODES ? size / size_t(part.narrow) * size_t(part.wide) : part.widen ? 2 * size : size;
}

void widen(const Part& part, const uint8_t* stored, size_t size, uint8_t* to) {
  if (part.widen == CODES) return widen_codes(stored, size, part.narrow, part.wide, to);
  for (size_t i = 0; i + 2 <= size; i += 2, to += 4) {
    uint16_t bits;
    memcpy(&bits, stored + i, 2);
    if (part.widen == FROM_BF16) {
      const uint32_t wide = uint32_t(bits) << 16;
      memcpy(to, &wide, 4);
    } else {
      const float wide = half(bits);
      memcpy(to, &wide, 4);
    }
  }
}

}  // namespace

uint64_t xxh64(const uint8_t* data, size_t size) {
  Hash hash;
  hash.add(data, size);
  return hash.digest();
}

Records::Records(int fd, const std::vector<std::vector<Part>>& layouts, std::vector<Extent> records, size_t step)
    : fd_(fd), step_(step), records_(std::move(records)) {
  if (!step_) throw std::invalid_argument("announcements of no bytes");
  std::vector<uint64_t> sizes(layouts.size(), 0);
  for (const Extent& record : records_) {
    if (record.layout >= layouts.size()) throw std::invalid_argument("a record of an unknown layout");
    uint64_t& size = sizes[record.layout];
    if (size && size != record.size) throw std::invalid_argument("records of one layout and different sizes");
    size = record.size;
  }
  for (size_t i = 0; i < layouts.size(); i++) layouts_.push_back(divide(layouts[i], size_t(sizes[i])));
}

// What each call reads: about PIECE, at most STAGED of it not straight to where it is used.
Records::Layout Records::divide(std::vector<Part> parts, size_t size) {
  Layout layout{std::move(parts), {}};
  size_t together = 0, staged = 0;
  auto add = [&](const Part* part, size_t bytes) {
    const bool direct = part && !part->widen;
    const size_t most = direct ? PIECE : STAGED / (part ? unit(*part) : 1) * (part ? unit(*part) : 1);
    for (size_t at = 0; at < bytes; at += most) {
      const Piece piece{part, at, std::min(most, bytes - at)};
      if (layout.reads.empty() || layout.reads.back().size() == MOST_BUFFERS || together + piece.size > PIECE ||
          (!direct && staged + piece.size > STAGED)) {
        layout.reads.emplace_back();
        together = staged = 0;
      }
      layout.reads.back().push_back(piece);
      together += piece.size;
      staged += direct ? 0 : piece.size;
    }
  };
  size_t end = 0;
  for (const Part& part : layout.parts) {
    if (part.offset < end) throw std::invalid_argument("parts overlap");
    if (part.size % unit(part)) throw std::invalid_argument("a part that cannot be widened");
    add(nullptr, part.offset - end);
    add(&part, part.size);
    end = part.offset + part.size;
  }
  if (size < end) throw std::invalid_argument("a record is shorter than its parts");
  add(nullptr, size - end);
  return layout;
}

void Records::announce(int index) const {
  const Extent& record = records_[size_t(index)];
  for (uint64_t at = 0; at < record.size; at += step_)
    posix_fadvise(fd_, off_t(record.offset + at), off_t(std::min<uint64_t>(step_, record.size - at)), POSIX_FADV_WILLNEED);
}

bool Records::cached(int index) const {
  const Extent& record = records_[size_t(index)];
  char last;
  const iovec piece{&last, 1};
  return preadv2(fd_, &piece, 1, off_t(record.offset + record.size - 1), RWF_NOWAIT) == 1;
}

Records::Outcome Records::read(int index, int slot, bool wait, std::string& error) const {
  const Extent& record = records_[size_t(index)];
  alignas(64) uint8_t staged[STAGED];
  std::vector<iovec> places;
  Hash hash;
  uint64_t got = 0;
  for (const auto& pieces : layouts_[record.layout].reads) {
    places.clear();
    size_t used = 0;
    for (const Piece& piece : pieces) {
      const Part* part = piece.part;
      places.push_back({piece.staged() ? staged + used : part->bank + part->row_bytes * size_t(slot) + piece.start, piece.size});
      used += piece.staged() ? piece.size : 0;
    }
    for (size_t first = 0; first < places.size();) {
      const ssize_t n = preadv2(fd_, &places[first], int(places.size() - first), off_t(record.offset + got), wait ? 0 : RWF_NOWAIT);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && !wait) return NOT_CACHED;  // EAGAIN, or a file system that cannot tell
      if (n < 0) return error = strerror(errno), FAILED;
      if (n == 0) return error = std::to_string(got) + " of " + std::to_string(record.size) + " bytes, the file is cut short", FAILED;
      got += uint64_t(n);
      for (size_t rest = size_t(n); rest;) {
        iovec& place = places[first];
        const size_t take = std::min(rest, place.iov_len);
        hash.add(static_cast<const uint8_t*>(place.iov_base), take);
        place.iov_base = static_cast<char*>(place.iov_base) + take;
        place.iov_len -= take;
        rest -= take;
        if (!place.iov_len) first++;
      }
    }
    used = 0;
    for (const Piece& piece : pieces) {
      if (!piece.staged()) continue;
      const Part* part = piece.part;
      if (part) widen(*part, staged + used, piece.size, part->bank + part->row_bytes * size_t(slot) + widened(*part, piece.start));
      used += piece.size;
    }
  }
  if (hash.digest() != record.digest) return error = "the bytes do not match their digest", FAILED;
  return DONE;
}

}  // namespace squizd
