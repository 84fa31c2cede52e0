#include "records.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>

#include <algorithm>
#include <stdexcept>

#include "hash.h"

namespace squizd {
namespace {

constexpr size_t PIECE = 512 << 10;  // read at once: still in the processor's cache when it is hashed
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

uint64_t xxh64(const uint8_t* data, size_t size) {
  Hash hash;
  hash.add(data, size);
  return hash.digest();
}

Records::Records(int fd, std::vector<Part> parts, std::vector<Extent> records, size_t step)
    : fd_(fd), step_(step), parts_(std::move(parts)), records_(std::move(records)) {
  if (!step_) throw std::invalid_argument("announcements of no bytes");
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

Records::Outcome Records::read(int index, int slot, bool wait, Buffer& buffer, std::string& error) const {
  const Extent& record = records_[size_t(index)];
  if (buffer.size() < staged_) buffer.resize(staged_);
  std::vector<iovec> pieces;
  size_t end = 0, held = 0;
  auto add = [&](uint8_t* to, size_t size) {
    for (size_t at = 0; at < size; at += PIECE) pieces.push_back({to + at, std::min(PIECE, size - at)});
  };
  auto stage = [&](size_t size) {
    add(buffer.data() + held, size);
    held += size;
  };
  for (const Part& part : parts_) {
    stage(part.offset - end);
    if (part.widen) stage(part.size);
    else add(part.bank + part.row_bytes * size_t(slot), part.size);
    end = part.offset + part.size;
  }
  stage(size_t(record.size) - end);

  Hash hash;
  uint64_t got = 0;
  for (size_t first = 0; first < pieces.size();) {
    size_t last = first, size = 0;  // as many buffers as make up a piece
    while (last < pieces.size() && last - first < MOST_BUFFERS && (size == 0 || size + pieces[last].iov_len <= PIECE)) size += pieces[last++].iov_len;
    const ssize_t n = preadv2(fd_, pieces.data() + first, int(last - first), off_t(record.offset + got), wait ? 0 : RWF_NOWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && !wait) return NOT_CACHED;  // EAGAIN, or a file system that cannot tell
    if (n < 0) return error = strerror(errno), FAILED;
    if (n == 0) return error = std::to_string(got) + " of " + std::to_string(record.size) + " bytes, the file is cut short", FAILED;
    got += uint64_t(n);
    for (size_t rest = size_t(n); rest;) {
      iovec& piece = pieces[first];
      const size_t take = std::min(rest, piece.iov_len);
      hash.add(static_cast<const uint8_t*>(piece.iov_base), take);
      piece.iov_base = static_cast<char*>(piece.iov_base) + take;
      piece.iov_len -= take;
      rest -= take;
      if (!piece.iov_len) first++;
    }
  }
  if (hash.digest() != record.digest) return error = "the bytes do not match their digest", FAILED;

  end = held = 0;
  for (const Part& part : parts_) {
    held += part.offset - end;
    if (part.widen) {
      widen(buffer.data() + held, part.size, part.widen, part.bank + part.row_bytes * size_t(slot));
      held += part.size;
    }
    end = part.offset + part.size;
  }
  return DONE;
}

}  // namespace squizd
