/* reader.c: reads and validates .squizd files, format 1.0. Section numbers refer to spec/squizd.md.
 *
 *   cc -std=c11 -O2 -o reader reader.c -lzstd            with zstd
 *   cc -std=c11 -O2 -DNO_ZSTD -o reader reader.c         without
 *
 * The head is held in memory; everything else is read in pieces, by position. The first fault in the order of section
 * 21 ends the work on a file: fail() jumps back to process(). */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include <fcntl.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifndef NO_ZSTD
#include <zstd.h>
#include <zstd_errors.h>
#endif

#define PIECE ((size_t)1 << 18) /* a multiple of 64, so that no element lies in two pieces */
#define MAX_RECORD ((uint64_t)1 << 36)
#define MAX_DOCUMENT ((size_t)1 << 21)
#define NONE SIZE_MAX

enum { META, STRS, FILE_, TENS, LAYT, MOEL, EXPI, BNDL, RESD, SHRD, PROF, SPRS, DRFT, ASTC, ANEC, UNKNOWN };
static const char TYPES[][5] = {"META", "STRS", "FILE", "TENS", "LAYT", "MOEL", "EXPI", "BNDL",
                                "RESD", "SHRD", "PROF", "SPRS", "DRFT", "ASTC", "ANEC"};
enum { RAW, AFFINE, MXFP4, MXFP8, NVFP4 };
static const char *const MODES[] = {"raw", "affine", "mxfp4", "mxfp8", "nvfp4"};
static const char *const DTYPES[] = {"", "f32", "f16", "bf16", "u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"};
static const uint8_t DTYPE_BYTES[] = {0, 4, 2, 2, 1, 1, 2, 2, 4, 4, 8, 8};
static const char *const ROLES[] = {"other",  "embedding", "attention", "router", "shared",
                                    "expert", "norm",      "head",      "dense",  "draft"};
enum { F32 = 1, F16, BF16, ROLE_EXPERT = 5, ROLE_DRAFT = 9 };

typedef struct { const uint8_t *p; size_t n; } Bytes;
typedef struct { Bytes s; size_t id; } Entry; /* for sorting */
typedef struct {
    int type;
    uint32_t flags;
    uint64_t offset, stored, raw, digest;
    unsigned codec;
    char name[5];
} Section;
typedef struct { uint64_t offset, stored, raw, digest; unsigned codec, layout; } Record;
typedef struct { uint32_t first, count; uint64_t raw; } Layout;
typedef struct { uint32_t layer, experts; Bytes path; } Module;
typedef struct {
    Bytes name;
    unsigned role, mode, dtype, bits, ndim;
    uint32_t group;
    uint64_t shape[4], offset[3], size[3]; /* of codes, scales, biases */
} Tensor;

typedef enum { J_NULL, J_BOOL, J_INTEGER, J_REAL, J_STRING, J_ARRAY, J_OBJECT } Kind;
typedef struct { Kind kind; uint32_t child, next, count; Bytes key, text; int64_t i; double d; size_t at; } Node;
typedef struct {
    Node *nodes;       /* node 0 is none, node 1 the document */
    uint8_t *text;     /* decoded strings */
    Entry *keys;
    size_t used, text_used, i, bad_number, bad_string;
} Document;

typedef struct Block { struct Block *next; } Block;
typedef struct {
    jmp_buf out;
    const char *code;
    uint64_t at, size, head_size, alignment, names_end, undecoded;
    int fd;
    uint8_t header[256], *head;
    uint32_t flags, count;
    Section sections[64];
    const Section *by_type[UNKNOWN];
    uint32_t n[UNKNOWN]; /* entries of the indexes; layouts for LAYT */
    uint32_t layout_tensors;
    uint16_t *name_at;   /* length of the name that starts at an offset of STRS */
    int64_t hidden, layers, set_index, set_count;
    bool has_hidden, has_layers;
    uint8_t *line;       /* the document, ended by a zero byte */
    size_t line_size, line_room;
    uint64_t document_at;
    bool document_coded; /* positions in the document are not positions in the file */
    Document doc;
    Block *blocks;
} Reader;

static uint8_t in_piece[PIECE];
#ifndef NO_ZSTD
static uint8_t out_piece[PIECE];
static ZSTD_DCtx *unzstd;
#endif

/* ---- errors and memory ---- */

static _Noreturn void fail(Reader *r, const char *code, uint64_t at) {
    r->code = code;
    r->at = at;
    longjmp(r->out, 1);
}

static _Noreturn void cannot(Reader *r, const char *why) {
    r->code = why;
    longjmp(r->out, 2);
}

static void need(Reader *r, bool holds, const char *code, uint64_t at) {
    if (!holds) fail(r, code, at);
}

static void *alloc(Reader *r, size_t count, size_t size) { /* zeroed; freed by release() or at the end */
    if (count > (SIZE_MAX / 2) / size) cannot(r, "out of memory");
    Block *b = calloc(1, sizeof(Block) + 8 + count * size);
    if (!b) cannot(r, "out of memory");
    b->next = r->blocks;
    r->blocks = b;
    return (uint8_t *)b + 16;
}

static void release(Reader *r, const Block *until) {
    while (r->blocks != until) {
        Block *b = r->blocks;
        r->blocks = b->next;
        free(b);
    }
}

/* ---- numbers, bytes, digests (section 1) ---- */

static uint64_t get(const uint8_t *p, int bytes) {
    uint64_t x = 0;
    for (int i = bytes; i-- > 0;) x = x << 8 | p[i];
    return x;
}
static uint32_t u16(const uint8_t *p) { return (uint32_t)get(p, 2); }
static uint32_t u32(const uint8_t *p) { return (uint32_t)get(p, 4); }
static uint64_t u64(const uint8_t *p) { return get(p, 8); }

static uint64_t align(uint64_t x, uint64_t a) { return (x + a - 1) / a * a; }

static bool is_zero(const uint8_t *p, uint64_t n) {
    for (uint64_t i = 0; i < n; i++)
        if (p[i]) return false;
    return true;
}

static const uint64_t P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, P3 = 0x165667B19E3779F9,
                      P4 = 0x85EBCA77C2B2AE63, P5 = 0x27D4EB2F165667C5;
typedef struct { uint64_t v[4], total; } Xxh;

static uint64_t rotl(uint64_t x, int r) { return x << r | x >> (64 - r); }
static uint64_t xxh_round(uint64_t a, uint64_t x) { return rotl(a + x * P2, 31) * P1; }
static Xxh xxh_start(void) { return (Xxh){{P1 + P2, P2, 0, 0 - P1}, 0}; }

static size_t xxh_stripes(Xxh *s, const uint8_t *p, size_t n) { /* takes whole stripes, returns how many bytes */
    size_t i = 0;
    for (; n - i >= 32; i += 32)
        for (int k = 0; k < 4; k++) s->v[k] = xxh_round(s->v[k], u64(p + i + 8 * k));
    s->total += i;
    return i;
}

static uint64_t xxh_end(const Xxh *s, const uint8_t *p, size_t n) { /* with the last n < 32 bytes */
    const uint64_t *v = s->v;
    uint64_t h = P5;
    if (s->total) {
        h = rotl(v[0], 1) + rotl(v[1], 7) + rotl(v[2], 12) + rotl(v[3], 18);
        for (int k = 0; k < 4; k++) h = (h ^ xxh_round(0, v[k])) * P1 + P4;
    }
    h += s->total + n;
    for (; n >= 8; p += 8, n -= 8) h = rotl(h ^ xxh_round(0, u64(p)), 27) * P1 + P4;
    for (; n >= 4; p += 4, n -= 4) h = rotl(h ^ u32(p) * P1, 23) * P2 + P3;
    for (; n > 0; p++, n--) h = rotl(h ^ *p * P5, 11) * P1;
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
}

static uint64_t xxh64(const uint8_t *p, size_t n) {
    Xxh s = xxh_start();
    size_t done = xxh_stripes(&s, p, n);
    return xxh_end(&s, p + done, n - done);
}

typedef struct { uint32_t h[8]; uint8_t part[64]; uint64_t total; } Sha;
static const uint32_t SHA_K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98,
    0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8,
    0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
    0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
    0xc67178f2};

static uint32_t rotr(uint32_t x, int r) { return x >> r | x << (32 - r); }

static void sha_block(uint32_t *h, const uint8_t *p) {
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++, p += 4)
        w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + (rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
               (rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t a = v[0], e = v[4];
        uint32_t t = v[7] + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + SHA_K[i] + w[i];
        uint32_t s = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t;
        v[0] = t + s;
    }
    for (int i = 0; i < 8; i++) h[i] += v[i];
}

static void sha_start(Sha *s) {
    static const uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                  0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->h, h, sizeof h);
    s->total = 0;
}

static void sha_add(Sha *s, const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        s->part[s->total++ % 64] = p[i];
        if (s->total % 64 == 0) sha_block(s->h, s->part);
    }
}

static void sha_print(Sha *s) {
    uint64_t bits = s->total * 8;
    uint8_t size[8];
    for (int i = 0; i < 8; i++) size[i] = (uint8_t)(bits >> (56 - 8 * i));
    sha_add(s, (const uint8_t *)"\x80", 1);
    while (s->total % 64 != 56) sha_add(s, (const uint8_t *)"", 1);
    sha_add(s, size, 8);
    for (int i = 0; i < 8; i++) printf("%08" PRIx32, s->h[i]);
}

/* ---- reading by position ---- */

static void read_at(Reader *r, uint64_t at, uint8_t *to, size_t n) {
    while (n > 0) {
        ssize_t got = pread(r->fd, to, n, (off_t)at);
        if (got <= 0) cannot(r, "read error");
        to += got;
        at += (uint64_t)got;
        n -= (size_t)got;
    }
}

static size_t piece_of(uint64_t left) { return left < PIECE ? (size_t)left : PIECE; }

static uint64_t digest_of(Reader *r, uint64_t at, uint64_t size) {
    Xxh s = xxh_start();
    size_t n = 0, done = 0;
    for (; size > 0; at += n, size -= n) {
        n = piece_of(size);
        read_at(r, at, in_piece, n);
        done = xxh_stripes(&s, in_piece, n);
    }
    return xxh_end(&s, in_piece + done, n - done);
}

static void check_padding(Reader *r, uint64_t from, uint64_t to) {
    for (size_t n; from < to; from += n) {
        n = piece_of(to - from);
        read_at(r, from, in_piece, n);
        need(r, is_zero(in_piece, n), "padding-nonzero", from);
    }
}

/* ---- strings, sorting ---- */

static int compare(Bytes a, Bytes b) {
    int c = memcmp(a.p, b.p, a.n < b.n ? a.n : b.n);
    return c ? c : (a.n > b.n) - (a.n < b.n);
}

static bool equals(Bytes a, const char *b) { return a.n == strlen(b) && !memcmp(a.p, b, a.n); }

static int compare_folded(Bytes a, Bytes b) { /* ASCII letters regardless of case */
    for (size_t i = 0; i < a.n && i < b.n; i++) {
        int x = a.p[i], y = b.p[i];
        if (x >= 'A' && x <= 'Z') x += 32;
        if (y >= 'A' && y <= 'Z') y += 32;
        if (x != y) return x - y;
    }
    return (a.n > b.n) - (a.n < b.n);
}

static int by_bytes(const void *a, const void *b) {
    const Entry *x = a, *y = b;
    int c = compare(x->s, y->s);
    return c ? c : (x->id > y->id) - (x->id < y->id);
}

static int by_folded(const void *a, const void *b) {
    const Entry *x = a, *y = b;
    int c = compare_folded(x->s, y->s);
    return c ? c : (x->id > y->id) - (x->id < y->id);
}

/* Sorts entries; returns the smallest id that repeats the string of a smaller id. */
static size_t first_repeated(Entry *e, size_t n, bool folded) {
    size_t first = NONE;
    if (n > 1) qsort(e, n, sizeof *e, folded ? by_folded : by_bytes);
    for (size_t i = 1; i < n; i++) {
        int c = folded ? compare_folded(e[i - 1].s, e[i].s) : compare(e[i - 1].s, e[i].s);
        if (c == 0 && e[i].id < first) first = e[i].id;
    }
    return first;
}

/* Bytes of the UTF-8 sequence at p, 0 if there is none. Shortest forms only, no surrogates. */
static size_t utf8_length(const uint8_t *p, size_t n) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t k = p[0] < 0x80 ? 1 : p[0] < 0xC2 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : p[0] < 0xF5 ? 4 : 0;
    if (k <= 1) return k;
    if (k > n) return 0;
    uint32_t c = p[0] & (0x7Fu >> k);
    for (size_t i = 1; i < k; i++) {
        if ((p[i] & 0xC0) != 0x80) return 0;
        c = c << 6 | (p[i] & 0x3F);
    }
    return c < least[k] || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF) ? 0 : k;
}

static size_t bad_utf8(const uint8_t *p, size_t n) { /* where, or NONE */
    for (size_t i = 0, k; i < n; i += k)
        if (!(k = utf8_length(p + i, n - i))) return i;
    return NONE;
}

static bool is_bare(Bytes s) { /* section 5 */
    for (size_t i = 0; i < s.n; i++) {
        int c = s.p[i];
        bool word = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_';
        if (!word && (i == 0 || (c != '.' && c != '-'))) return false;
    }
    return s.n >= 1 && s.n <= 128 && s.p[s.n - 1] != '.';
}

/* ---- restricted JSON (section 6) ---- */

static uint64_t document_place(const Reader *r, size_t i) { return r->document_at + (r->document_coded ? 0 : i); }

static void line_add(Reader *r, const uint8_t *p, size_t n) {
    if (r->line_room - r->line_size <= n) {
        size_t room = (r->line_size + n + 1) * 2;
        uint8_t *line = realloc(r->line, room);
        if (!line) cannot(r, "out of memory");
        r->line = line;
        r->line_room = room;
    }
    if (n) memcpy(r->line + r->line_size, p, n);
    r->line[r->line_size += n] = 0;
}

static size_t structure_scan(Reader *r) { /* returns the number of commas and opening brackets */
    size_t tokens = 0, deep_at = NONE, slashes = 0;
    int64_t depth = 0;
    bool inside = false;
    for (size_t i = 0; i < r->line_size; i++) {
        int c = r->line[i];
        if (c == '"' && slashes % 2 == 0) inside = !inside;
        slashes = c == '\\' ? slashes + 1 : 0;
        if (inside) continue;
        if (c == ',' || c == '[' || c == '{')
            need(r, ++tokens <= (size_t)1 << 17, "json-tokens", document_place(r, i));
        depth += (c == '[' || c == '{') - (c == ']' || c == '}');
        if (depth > 32 && deep_at == NONE) deep_at = i;
    }
    need(r, deep_at == NONE, "json-depth", document_place(r, deep_at));
    return tokens;
}

static _Noreturn void syntax(Reader *r) { fail(r, "json-syntax", document_place(r, r->doc.i)); }
static int peek(const Reader *r) { return r->line[r->doc.i]; } /* 0 at the end, which no rule accepts */

static void skip_space(Reader *r) {
    while (peek(r) && strchr(" \t\n\r", peek(r))) r->doc.i++;
}

static void put_utf8(Document *d, uint32_t c) { /* surrogates too, so that keys can be compared */
    uint8_t *p = d->text + d->text_used;
    size_t k = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    d->text_used += k;
    for (size_t i = k; i-- > 1; c >>= 6) p[i] = (uint8_t)(0x80 | (c & 0x3F));
    p[0] = (uint8_t)(k == 1 ? c : (0xF00u >> k & 0xFF) | c);
}

static int64_t hex4(const uint8_t *p) { /* -1 if these are not four hexadecimal digits */
    int64_t x = 0;
    for (int i = 0; i < 4; i++) {
        static const char all[] = "0123456789abcdef0123456789ABCDEF";
        const char *digit = p[i] ? strchr(all, p[i]) : NULL;
        if (!digit) return -1;
        x = x << 4 | ((digit - all) & 15);
    }
    return x;
}

static void parse_escape(Reader *r) { /* after the backslash */
    Document *d = &r->doc;
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *simple = peek(r) ? strchr(from, peek(r)) : NULL;
    if (simple) {
        d->i++;
        put_utf8(d, (uint8_t)to[simple - from]);
        return;
    }
    int64_t c = peek(r) == 'u' ? hex4(r->line + d->i + 1) : -1;
    if (c < 0) syntax(r);
    size_t at = d->i - 1;
    d->i += 5;
    if (c >= 0xD800 && c < 0xDC00 && peek(r) == '\\' && r->line[d->i + 1] == 'u') {
        int64_t low = hex4(r->line + d->i + 2);
        if (low >= 0xDC00 && low < 0xE000) {
            c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
            d->i += 6;
        }
    }
    if ((c == 0 || (c >= 0xD800 && c < 0xE000)) && d->bad_string == NONE) d->bad_string = at;
    put_utf8(d, (uint32_t)c);
}

static Bytes parse_string(Reader *r) {
    Document *d = &r->doc;
    if (peek(r) != '"') syntax(r);
    d->i++;
    Bytes s = {d->text + d->text_used, 0};
    while (peek(r) != '"') {
        if (peek(r) < 0x20) syntax(r);
        if (peek(r) == '\\') {
            d->i++;
            parse_escape(r);
        } else {
            d->text[d->text_used++] = r->line[d->i++];
        }
    }
    d->i++;
    s.n = (size_t)(d->text + d->text_used - s.p);
    return s;
}

static void digits(Reader *r) {
    if (peek(r) < '0' || peek(r) > '9') syntax(r);
    while (peek(r) >= '0' && peek(r) <= '9') r->doc.i++;
}

static void parse_number(Reader *r, Node *v) {
    Document *d = &r->doc;
    size_t start = d->i;
    bool minus = peek(r) == '-', good, real = false;
    if (minus) d->i++;
    size_t first = d->i;
    if (peek(r) == '0') d->i++;
    else digits(r);
    size_t end = d->i;
    if (peek(r) == '.') {
        real = true;
        d->i++;
        digits(r);
    }
    if (peek(r) == 'e' || peek(r) == 'E') {
        real = true;
        d->i++;
        if (peek(r) == '+' || peek(r) == '-') d->i++;
        digits(r);
    }
    v->kind = real ? J_REAL : J_INTEGER;
    if (real) {
        v->d = strtod((const char *)r->line + start, NULL);
        good = isfinite(v->d);
    } else {
        uint64_t x = 0;
        for (size_t i = first; i < end && end - first <= 16; i++) x = x * 10 + (r->line[i] - '0');
        good = end - first <= 16 && x <= ((uint64_t)1 << 53) - 1;
        v->i = minus ? -(int64_t)x : (int64_t)x;
        v->d = (double)v->i;
    }
    if (!good && d->bad_number == NONE) d->bad_number = start;
}

static void parse_word(Reader *r, const char *word) {
    for (; *word; word++, r->doc.i++)
        if (peek(r) != *word) syntax(r);
}

static uint32_t parse_value(Reader *r, int depth);

static void parse_members(Reader *r, Node *v, int depth) { /* of an array or object */
    Document *d = &r->doc;
    bool object = v->kind == J_OBJECT;
    int close = object ? '}' : ']';
    uint32_t *link = &v->child;
    d->i++;
    skip_space(r);
    if (peek(r) == close) {
        d->i++;
        return;
    }
    for (;; d->i++) {
        Bytes key = {NULL, 0};
        skip_space(r);
        size_t at = d->i;
        if (object) {
            key = parse_string(r);
            skip_space(r);
            if (peek(r) != ':') syntax(r);
            d->i++;
        }
        uint32_t member = parse_value(r, depth + 1);
        d->nodes[member].key = key;
        d->nodes[member].at = at;
        *link = member;
        link = &d->nodes[member].next;
        v->count++;
        if (peek(r) == close) break;
        if (peek(r) != ',') syntax(r);
    }
    d->i++;
}

/* Recursion ends at 32, as the structure scan said; a value follows the start, a comma or an opening bracket, so the
 * scan has counted the nodes as well. */
static uint32_t parse_value(Reader *r, int depth) {
    Document *d = &r->doc;
    skip_space(r);
    uint32_t id = (uint32_t)d->used++;
    Node *v = &d->nodes[id];
    int c = peek(r);
    v->at = d->i;
    if ((c == '{' || c == '[') && depth < 32) {
        v->kind = c == '{' ? J_OBJECT : J_ARRAY;
        parse_members(r, v, depth);
    } else if (c == '"') {
        v->kind = J_STRING;
        v->text = parse_string(r);
    } else if (c == '-' || (c >= '0' && c <= '9')) {
        parse_number(r, v);
    } else {
        v->kind = c == 'n' ? J_NULL : J_BOOL;
        parse_word(r, c == 't' ? "true" : c == 'f' ? "false" : "null");
    }
    skip_space(r);
    return id;
}

static void check_keys(Reader *r) {
    Document *d = &r->doc;
    for (size_t k = 1; k < d->used; k++) {
        if (d->nodes[k].kind != J_OBJECT) continue;
        size_t n = 0;
        for (uint32_t m = d->nodes[k].child; m; m = d->nodes[m].next) d->keys[n++] = (Entry){d->nodes[m].key, m};
        size_t twice = first_repeated(d->keys, n, false);
        if (twice != NONE) fail(r, "json-duplicate-key", document_place(r, d->nodes[twice].at));
    }
}

static const Node *parse_document(Reader *r) { /* parses r->line; release() frees it */
    Document *d = &r->doc;
    size_t n = r->line_size;
    size_t bad = n >= 3 && !memcmp(r->line, "\xEF\xBB\xBF", 3) ? 0 : bad_utf8(r->line, n);
    need(r, bad == NONE, "json-utf8", document_place(r, bad));
    size_t values = structure_scan(r) + 2;
    *d = (Document){.used = 1, .bad_number = NONE, .bad_string = NONE};
    d->nodes = alloc(r, values, sizeof(Node));
    d->keys = alloc(r, values, sizeof(Entry));
    d->text = alloc(r, n + 4, 1);
    parse_value(r, 0);
    if (d->i != n) syntax(r);
    need(r, d->bad_number == NONE, "json-number", document_place(r, d->bad_number));
    check_keys(r);
    need(r, d->bad_string == NONE, "json-string", document_place(r, d->bad_string));
    return &d->nodes[1];
}

/* ---- types of members (section 6) ---- */

enum { T_STRING, T_OBJECT, T_ARRAY, T_INTEGER, T_COUNT, T_NUMBER, T_DIGEST, T_SHA256 };

static bool is_hex(Bytes s, size_t n) {
    for (size_t i = 0; i < s.n; i++)
        if (!((s.p[i] >= '0' && s.p[i] <= '9') || (s.p[i] >= 'a' && s.p[i] <= 'f'))) return false;
    return s.n == n;
}

static bool has_type(const Node *v, int type) {
    switch (type) {
    case T_STRING: return v->kind == J_STRING;
    case T_OBJECT: return v->kind == J_OBJECT;
    case T_ARRAY: return v->kind == J_ARRAY;
    case T_INTEGER: return v->kind == J_INTEGER;
    case T_COUNT: return v->kind == J_INTEGER && v->i >= 0;
    case T_NUMBER: return v->kind == J_INTEGER || v->kind == J_REAL;
    case T_DIGEST: return v->kind == J_STRING && is_hex(v->text, 16);
    default: return v->kind == J_STRING && is_hex(v->text, 64);
    }
}

static const Node *node(const Reader *r, uint32_t id) { return id ? &r->doc.nodes[id] : NULL; }
static const Node *first(const Reader *r, const Node *v) { return node(r, v->child); }
static const Node *next(const Reader *r, const Node *v) { return node(r, v->next); }

static const Node *member(const Reader *r, const Node *object, const char *key) {
    const Node *m = object && object->kind == J_OBJECT ? first(r, object) : NULL;
    while (m && !equals(m->key, key)) m = next(r, m);
    return m;
}

static const Node *optional(Reader *r, const Node *object, const char *key, int type, const char *code) {
    const Node *m = member(r, object, key);
    if (m) need(r, has_type(m, type), code, document_place(r, m->at));
    return m;
}

static const Node *required(Reader *r, const Node *object, const char *key, int type, const char *code) {
    const Node *m = optional(r, object, key, type, code);
    if (!m) fail(r, code, document_place(r, object->at));
    return m;
}

static const Node *array(Reader *r, const Node *object, const char *key, int type, const char *code) {
    const Node *a = required(r, object, key, T_ARRAY, code);
    for (const Node *m = first(r, a); m; m = next(r, m)) need(r, has_type(m, type), code, document_place(r, m->at));
    return a;
}

/* ---- header (section 3) ---- */

static void check_signature(Reader *r) {
    uint8_t *h = r->header;
    size_t n = r->size < 256 ? (size_t)r->size : 256;
    need(r, n > 0, "file-empty", 0);
    read_at(r, 0, h, n);
    need(r, !memcmp(h, "SQZD", n < 4 ? n : 4), "bad-magic", 0);
    need(r, n == 256, "file-short", n);
    need(r, !memcmp(h + 4, "\r\n\x1A\n", 4), "text-mode-damage", 4);
    need(r, u16(h + 8) != 0, "version-zero", 8);
    need(r, u16(h + 8) != 256, "version-byte-swapped", 8);
    need(r, u16(h + 8) == 1, "version-future", 8);
    need(r, u64(h + 248) == xxh64(h, 248), "header-digest", 248);
}

static void check_header(Reader *r) {
    const uint8_t *h = r->header;
    r->count = u32(h + 48);
    r->flags = u32(h + 64);
    r->alignment = u32(h + 68);
    r->head_size = u64(h + 72);
    need(r, u32(h + 12) == 256, "header-size", 12);
    need(r, u64(h + 16) == 0, "unknown-required-feature", 16);
    need(r, r->size >= u64(h + 32), "file-truncated", 32);
    need(r, r->size <= u64(h + 32), "trailing-bytes", u64(h + 32));
    need(r, u64(h + 40) == 256, "directory-offset", 40);
    need(r, r->count >= 1 && r->count <= 64, "section-count", 48);
    need(r, u32(h + 52) == 64, "directory-entry-size", 52);
    bool power = (r->alignment & (r->alignment - 1)) == 0;
    need(r, power && r->alignment >= 64 && r->alignment <= 1 << 24, "record-alignment", 68);
    need(r, r->head_size <= 1 << 24 && r->head_size <= r->size, "head-limit", 72);
    need(r, 256 + 64 * (uint64_t)r->count <= r->head_size, "directory-range", 72);
    need(r, is_zero(h + 80, 168), "header-reserved", 80);
}

/* ---- directory (section 4) ---- */

static void check_directory_entry(Reader *r, Section *s, const uint8_t *p, uint64_t at) {
    bool letters = true;
    for (int i = 0; i < 4; i++)
        letters &= (p[i] >= '0' && p[i] <= '9') || (p[i] >= 'A' && p[i] <= 'Z') || (p[i] >= 'a' && p[i] <= 'z');
    *s = (Section){UNKNOWN, u32(p + 4), u64(p + 8), u64(p + 16), u64(p + 24), u64(p + 40), u16(p + 32), ""};
    memcpy(s->name, p, 4);
    for (int t = META; t < UNKNOWN; t++)
        if (!memcmp(p, TYPES[t], 4)) s->type = t;
    bool ancillary = s->type > SHRD;
    uint64_t limit = s->type <= STRS ? MAX_DOCUMENT : ancillary ? MAX_RECORD : UINT64_MAX;
    need(r, letters, "section-type", at);
    need(r, s->flags <= 1, "section-flags", at + 4);
    need(r, s->type == UNKNOWN || s->flags == !ancillary, "section-critical-flag", at + 4);
    need(r, s->type != UNKNOWN || s->flags == 0, "section-unknown-critical", at + 4);
    need(r, s->stored && s->raw, "section-empty", at + 16);
    need(r, s->codec <= ancillary, "section-codec", at + 32);
    need(r, s->stored <= limit && s->raw <= limit, "section-limit", at + 16);
    need(r, s->codec == 1 || s->stored == s->raw, "section-size", at + 24);
    need(r, s->codec == 0 || s->raw <= 64 * s->stored, "section-ratio", at + 24);
    need(r, is_zero(p + 34, 6) && is_zero(p + 48, 16), "section-reserved", at + 34);
    need(r, s->type < BNDL || s->type > SHRD || s->digest == 0, "data-section-digest", at + 40);
    for (const Section *o = r->sections; o < s; o++) need(r, memcmp(o->name, s->name, 4), "section-duplicate", at);
    if (s->type != UNKNOWN) r->by_type[s->type] = s;
}

static void check_directory(Reader *r) {
    uint8_t d[64 * 64];
    read_at(r, 256, d, 64 * r->count);
    need(r, u64(r->header + 56) == xxh64(d, 64 * r->count), "directory-digest", 256);
    for (uint32_t i = 0; i < r->count; i++) check_directory_entry(r, &r->sections[i], d + 64 * i, 256 + 64 * i);
}

static void check_together(Reader *r, const int *types, int n) {
    bool some = false, all = true;
    for (int i = 0; i < n; i++) {
        some |= r->by_type[types[i]] != NULL;
        all &= r->by_type[types[i]] != NULL;
    }
    need(r, all || !some, "section-incomplete-set", 256);
}

static void check_sections(Reader *r) {
    static const int always[] = {META, STRS, TENS, RESD}, moe[] = {LAYT, MOEL, EXPI, SHRD}, files[] = {FILE_, BNDL};
    uint64_t directory_end = 256 + 64 * (uint64_t)r->count, end = directory_end, head_end = 0;
    int rank = META;
    for (int i = 0; i < 4; i++) need(r, r->by_type[always[i]], "section-missing", 256);
    check_together(r, moe, 4);
    check_together(r, files, 2);
    for (uint32_t i = 0; i < r->count; i++) {
        const Section *s = &r->sections[i];
        uint64_t at = 256 + 64 * i, a = s->type == SHRD ? r->alignment : 64;
        int own = s->type > SHRD ? PROF : s->type;
        need(r, own >= rank, "section-order", at);
        need(r, s->offset <= UINT64_MAX - s->stored, "section-wraps", at + 8);
        need(r, s->offset >= directory_end, "section-over-header", at + 8);
        need(r, s->offset >= end, "section-overlap", at + 8);
        need(r, s->offset % a == 0, "section-unaligned", at + 8);
        need(r, s->offset == align(end, a), "section-gap", at + 8);
        end = s->offset + s->stored;
        need(r, end <= r->size, "section-range", at + 16);
        if (s->type <= EXPI) head_end = end;
        rank = own;
    }
    need(r, end == r->size, "section-gap", end);
    need(r, head_end == r->head_size, "head-size", 72);
}

static const uint8_t *data_of(const Reader *r, int type) { return r->head + r->by_type[type]->offset; }
static uint64_t size_of(const Reader *r, int type) { return r->by_type[type] ? r->by_type[type]->stored : 0; }
static uint64_t end_of(const Reader *r, int type) { return r->by_type[type]->offset + r->by_type[type]->stored; }
static uint64_t place(const Reader *r, const uint8_t *p) { return (uint64_t)(p - r->head); }

static void check_head(Reader *r) {
    r->head = alloc(r, (size_t)r->head_size, 1);
    read_at(r, 0, r->head, (size_t)r->head_size);
    uint64_t end = 256 + 64 * (uint64_t)r->count;
    for (uint32_t i = 0; i < r->count && r->sections[i].type <= EXPI; i++) {
        const Section *s = &r->sections[i];
        need(r, is_zero(r->head + end, s->offset - end), "padding-nonzero", end);
        need(r, s->digest == xxh64(r->head + s->offset, (size_t)s->stored), "section-digest", s->offset);
        end = s->offset + s->stored;
    }
}

static void check_index_sizes(Reader *r) {
    static const struct { int type; uint32_t bytes, limit; } index[] = {
        {FILE_, 48, 256}, {TENS, 136, 1 << 14}, {LAYT, 0, 1 << 10}, {MOEL, 16, 1 << 12}, {EXPI, 48, 1 << 17}};
    for (int i = 0; i < 5; i++) {
        int type = index[i].type;
        uint64_t size = size_of(r, type);
        if (!size) continue;
        uint64_t at = r->by_type[type]->offset;
        if (type == LAYT) {
            need(r, size >= 8, "index-size", at);
            uint64_t layouts = u32(r->head + at), tensors = u32(r->head + at + 4);
            need(r, size == 8 + 16 * layouts + 96 * tensors, "index-size", at);
            need(r, layouts <= index[i].limit && tensors <= 1 << 13, "index-count", at);
            r->n[LAYT] = (uint32_t)layouts;
            r->layout_tensors = (uint32_t)tensors;
        } else {
            need(r, size % index[i].bytes == 0, "index-size", at);
            need(r, size / index[i].bytes <= index[i].limit, "index-count", at);
            r->n[type] = (uint32_t)(size / index[i].bytes);
        }
    }
}

/* ---- metadata (section 7) ---- */

static void check_metadata_types(Reader *r, const Node *root) {
    static const char code[] = "metadata-type";
    need(r, has_type(root, T_OBJECT), code, r->document_at);
    const Node *config = required(r, required(r, root, "model", T_OBJECT, code), "config", T_OBJECT, code);
    required(r, config, "model_type", T_STRING, code);
    const Node *recipe = required(r, root, "recipe", T_OBJECT, code);
    optional(r, recipe, "name", T_STRING, code);
    optional(r, recipe, "quantizer", T_STRING, code);
    const Node *origin = required(r, root, "provenance", T_OBJECT, code);
    optional(r, origin, "tool", T_STRING, code);
    optional(r, origin, "version", T_STRING, code);
    const Node *source = optional(r, origin, "source", T_OBJECT, code);
    optional(r, source, "repo", T_STRING, code);
    optional(r, source, "revision", T_STRING, code);
    if (member(r, source, "files"))
        for (const Node *f = first(r, array(r, source, "files", T_OBJECT, code)); f; f = next(r, f)) {
            required(r, f, "name", T_STRING, code);
            required(r, f, "size", T_COUNT, code);
            required(r, f, "sha256", T_SHA256, code);
        }
    optional(r, optional(r, origin, "calibration", T_OBJECT, code), "sha256", T_SHA256, code);
    optional(r, root, "licence", T_STRING, code);
    optional(r, root, "description", T_STRING, code);
    const Node *set = optional(r, root, "set", T_OBJECT, code);
    r->set_index = set ? required(r, set, "index", T_COUNT, code)->i : 0;
    r->set_count = set ? required(r, set, "count", T_COUNT, code)->i : 1;
    if (member(r, root, "siblings"))
        for (const Node *s = first(r, array(r, root, "siblings", T_OBJECT, code)); s; s = next(r, s)) {
            required(r, s, "name", T_STRING, code);
            required(r, s, "size", T_COUNT, code);
            required(r, s, "file_id", T_SHA256, code);
        }
    const Node *hidden = member(r, config, "hidden_size"), *layers = member(r, config, "num_hidden_layers");
    if ((r->has_hidden = hidden && hidden->kind == J_INTEGER)) r->hidden = hidden->i;
    if ((r->has_layers = layers && layers->kind == J_INTEGER)) r->layers = layers->i;
}

static void check_set(Reader *r, const Node *root) { /* section 18 */
    const Node *siblings = member(r, root, "siblings");
    uint64_t at = document_place(r, siblings ? siblings->at : 0);
    int64_t n = siblings ? siblings->count : 0;
    Entry *names = alloc(r, (size_t)n + 1, sizeof *names);
    size_t k = 0;
    for (const Node *s = siblings ? first(r, siblings) : NULL; s; s = next(r, s), k++) {
        names[k] = (Entry){member(r, s, "name")->text, k};
        need(r, is_bare(names[k].s), "sibling-name", document_place(r, s->at));
    }
    need(r, r->set_index < r->set_count, "metadata-set", at);
    need(r, n == (r->set_index == 0 ? r->set_count - 1 : 0), "metadata-set", at);
    need(r, first_repeated(names, k, true) == NONE, "metadata-set", at);
}

static void check_metadata(Reader *r) {
    const Block *before = r->blocks;
    r->document_at = r->by_type[META]->offset;
    line_add(r, data_of(r, META), (size_t)size_of(r, META));
    const Node *root = parse_document(r);
    check_metadata_types(r, root);
    check_set(r, root);
    release(r, before);
    r->line_size = 0;
}

/* ---- names (section 5) ---- */

static Bytes name_of(const Reader *r, const uint8_t *p) { /* p: name_offset, name_length; empty if out of range */
    uint64_t offset = u32(p), n = u16(p + 4);
    if (n == 0 || n > 512 || offset + n > size_of(r, STRS)) return (Bytes){r->head, 0};
    return (Bytes){data_of(r, STRS) + offset, n};
}

static Bytes check_name(Reader *r, const uint8_t *p) {
    uint64_t offset = u32(p), n = u16(p + 4), at = place(r, p);
    need(r, n >= 1 && n <= 512, "name-length", at);
    need(r, offset + n <= size_of(r, STRS), "name-range", at);
    if (r->name_at[offset] != n) {
        need(r, offset == r->names_end, "name-place", at);
        r->names_end += n;
        r->name_at[offset] = (uint16_t)n;
    }
    Bytes s = name_of(r, p);
    need(r, bad_utf8(s.p, s.n) == NONE, "name-utf8", at);
    for (size_t i = 0; i < s.n; i++) {
        bool c1 = s.p[i] == 0xC2 && s.p[i + 1] < 0xA0;
        need(r, s.p[i] >= 0x20 && s.p[i] != 0x7F && !c1, "name-control", at);
    }
    return s;
}

/* The first entry that repeats the name of one before it. */
static size_t repeated_name(Reader *r, const uint8_t *p, size_t stride, size_t count, bool folded) {
    const Block *before = r->blocks;
    Entry *e = alloc(r, count + 1, sizeof *e);
    size_t n = 0;
    for (size_t i = 0; i < count; i++) {
        Bytes s = name_of(r, p + i * stride);
        if (s.n) e[n++] = (Entry){s, i};
    }
    size_t twice = first_repeated(e, n, folded);
    release(r, before);
    return twice;
}

/* ---- index entries (sections 8 to 12) ---- */

static Record read_record(const uint8_t *p) {
    return (Record){u64(p), u64(p + 8), u64(p + 16), u64(p + 32), u16(p + 24), u16(p + 26)};
}

static Tensor read_tensor(const Reader *r, const uint8_t *p) {
    Tensor t = {.name = name_of(r, p), .role = u16(p + 6), .mode = p[8], .dtype = p[9], .bits = p[10], .ndim = p[11]};
    t.group = u32(p + 12);
    for (int i = 0; i < 4; i++) t.shape[i] = u64(p + 16 + 8 * i);
    for (int i = 0; i < 3; i++) t.offset[i] = u64(p + 48 + 16 * i), t.size[i] = u64(p + 56 + 16 * i);
    return t;
}

static Layout layout_at(const Reader *r, uint32_t i) {
    const uint8_t *p = data_of(r, LAYT) + 8 + 16 * (size_t)i;
    return (Layout){u32(p), u32(p + 4), u64(p + 8)};
}

static const uint8_t *layout_tensor(const Reader *r, uint32_t j) {
    return data_of(r, LAYT) + 8 + 16 * (size_t)r->n[LAYT] + 96 * (size_t)j;
}

static Module module_at(const Reader *r, uint32_t i) {
    const uint8_t *p = data_of(r, MOEL) + 16 * (size_t)i;
    return (Module){u32(p), u32(p + 4), name_of(r, p + 8)};
}

static const uint8_t *resident_at(const Reader *r, uint32_t i) { return data_of(r, TENS) + 136 * (size_t)i; }
static const uint8_t *expert_at(const Reader *r, uint32_t i) { return data_of(r, EXPI) + 48 * (size_t)i; }
static const uint8_t *file_at(const Reader *r, uint32_t i) { return data_of(r, FILE_) + 48 * (size_t)i; }

static bool is_encoding(const Tensor *t) {
    if (t->mode == RAW) return t->bits == 0 && t->group == 0;
    if (t->dtype > BF16) return false;
    if (t->mode == AFFINE)
        return t->bits >= 2 && t->bits <= 8 && t->bits != 7 && (t->group == 32 || t->group == 64 || t->group == 128);
    return t->bits == (t->mode == MXFP8 ? 8 : 4) && t->group == (t->mode == NVFP4 ? 16 : 32);
}

static void implied_sizes(const Tensor *t, uint64_t n, uint64_t *size) {
    size[0] = t->mode == RAW ? n * DTYPE_BYTES[t->dtype] : n / 8 * t->bits;
    size[1] = t->mode == RAW ? 0 : n / t->group * (t->mode == AFFINE ? DTYPE_BYTES[t->dtype] : 1);
    size[2] = t->mode == AFFINE ? size[1] : 0;
}

static uint64_t check_shape(Reader *r, const Tensor *t, uint64_t at) { /* returns the number of elements */
    uint64_t n = 1;
    bool zero = false, over = false;
    need(r, t->ndim >= 1 && t->ndim <= 4, "tensor-dims", at + 11);
    for (unsigned i = t->ndim; i < 4; i++) need(r, t->shape[i] == 0, "tensor-unused-dim", at + 16 + 8 * i);
    for (unsigned i = 0; i < t->ndim && !zero; i++) zero = t->shape[i] == 0;
    need(r, !zero, "tensor-zero-dim", at + 16);
    for (unsigned i = 0; i < t->ndim && !over; i++) {
        over = t->shape[i] > ((uint64_t)1 << 48) / n;
        n *= over ? 1 : t->shape[i];
    }
    need(r, !over, "tensor-overflow", at + 16);
    need(r, t->group == 0 || t->shape[t->ndim - 1] % t->group == 0, "row-not-divisible", at + 16);
    return n;
}

/* The rules of a tensor; *end is where the part before ended, 0 at the start of a record. */
static void check_tensor(Reader *r, const uint8_t *p, bool in_layout, uint64_t *end) {
    uint64_t at = place(r, p), size[3];
    check_name(r, p);
    Tensor t = read_tensor(r, p);
    need(r, t.role <= ROLE_DRAFT && (t.role == ROLE_EXPERT) == in_layout, "tensor-role", at + 6);
    need(r, t.mode <= NVFP4, "tensor-mode", at + 8);
    need(r, t.dtype >= 1 && t.dtype <= 11, "tensor-dtype", at + 9);
    need(r, is_encoding(&t), "tensor-encoding", at + 8);
    implied_sizes(&t, check_shape(r, &t, at), size);
    for (int i = 0; i < 3; i++) {
        uint64_t here = at + 48 + 16 * (uint64_t)i;
        need(r, t.size[i] == size[i], "part-size", here + 8);
        need(r, t.size[i] <= MAX_RECORD && t.offset[i] <= MAX_RECORD - t.size[i], "part-range", here);
        need(r, t.offset[i] == (size[i] ? align(*end, 64) : 0), "part-offset", here);
        if (size[i]) *end = t.offset[i] + size[i];
    }
}

/* The rules of a record; raw_size is NULL where nothing prescribes it. */
static Record check_record(Reader *r, const uint8_t *p, uint64_t offset, bool layout_ok, bool reserved_ok) {
    Record x = read_record(p);
    uint64_t at = place(r, p);
    need(r, x.offset == offset, "record-offset", at);
    need(r, x.codec <= 1, "record-codec", at + 24);
    need(r, x.stored <= MAX_RECORD && x.raw <= MAX_RECORD, "record-limit", at + 8);
    need(r, x.stored && x.raw, "record-empty", at + 8);
    need(r, x.codec == 1 || x.stored == x.raw, "record-size", at + 16);
    need(r, x.codec == 0 || x.raw <= 64 * x.stored, "record-ratio", at + 16);
    need(r, layout_ok, "record-layout", at + 26);
    need(r, reserved_ok && is_zero(p + 28, 4), "index-reserved", at + 28);
    return x;
}

static void check_files(Reader *r) {
    if (!r->n[FILE_]) return;
    size_t twice = repeated_name(r, file_at(r, 0), 48, r->n[FILE_], true);
    uint64_t end = r->by_type[BNDL]->offset;
    for (uint32_t i = 0; i < r->n[FILE_]; i++) {
        const uint8_t *p = file_at(r, i);
        need(r, is_bare(check_name(r, p)), "file-name", place(r, p));
        need(r, i != twice, "name-duplicate", place(r, p));
        Record x = check_record(r, p + 8, align(end, 64), u16(p + 34) == 0, is_zero(p + 6, 2));
        end = x.offset + x.stored;
    }
    need(r, end == end_of(r, BNDL), "record-range", end);
}

static void check_residents(Reader *r) {
    size_t twice = repeated_name(r, resident_at(r, 0), 136, r->n[TENS], false);
    uint64_t end = r->by_type[RESD]->offset;
    for (uint32_t i = 0; i < r->n[TENS]; i++) {
        const uint8_t *p = resident_at(r, i);
        uint64_t raw = 0;
        check_tensor(r, p, false, &raw);
        need(r, i != twice, "name-duplicate", place(r, p));
        Record x = check_record(r, p + 96, align(end, 64), u16(p + 122) == 0, true);
        need(r, x.raw == raw, "record-raw-size", place(r, p + 112));
        end = x.offset + x.stored;
    }
    need(r, end == end_of(r, RESD), "record-range", end);
}

/* Section 12: modules with a smaller rank first, in each rank the weights first. */
static bool in_order(Bytes name, int *top) {
    static const struct { const char *name; int rank; } modules[] = {
        {"gate_proj", 0}, {"up_proj", 1}, {"down_proj", 2}, {"fc1", 0}, {"fc2", 1}};
    const uint8_t *dot = memchr(name.p, '.', name.n);
    Bytes module = {name.p, dot ? (size_t)(dot - name.p) : name.n};
    Bytes rest = {name.p + module.n + 1, dot ? name.n - module.n - 1 : 0};
    for (int m = 0; m < 5; m++) {
        if (!equals(module, modules[m].name)) continue;
        int place = 2 * modules[m].rank + !(dot && equals(rest, "weight"));
        if (place < *top) return false;
        *top = place;
    }
    return true;
}

static void check_layouts(Reader *r) {
    uint32_t taken = 0;
    for (uint32_t i = 0; i < r->n[LAYT]; i++) {
        Layout l = layout_at(r, i);
        uint64_t at = r->by_type[LAYT]->offset + 8 + 16 * (uint64_t)i, end = 0;
        int top = 0;
        need(r, l.first == taken && l.count <= r->layout_tensors - taken, "layout-range", at);
        need(r, l.count > 0, "layout-empty", at + 4);
        size_t twice = repeated_name(r, layout_tensor(r, l.first), 96, l.count, false);
        for (uint32_t j = 0; j < l.count; j++) {
            const uint8_t *p = layout_tensor(r, l.first + j);
            check_tensor(r, p, true, &end);
            need(r, j != twice, "name-duplicate", place(r, p));
            need(r, in_order(name_of(r, p), &top), "layout-order", place(r, p));
        }
        need(r, l.raw == end, "layout-raw-size", at + 8);
        taken += l.count;
    }
    need(r, taken == r->layout_tensors, "layout-range", size_of(r, LAYT) ? r->by_type[LAYT]->offset : 0);
}

static void check_modules(Reader *r) {
    if (!r->n[MOEL]) return;
    const uint8_t *p = data_of(r, MOEL);
    size_t twice = repeated_name(r, p + 8, 16, r->n[MOEL], false);
    for (uint32_t i = 0; i < r->n[MOEL]; i++, p += 16) {
        check_name(r, p + 8);
        need(r, i != twice, "name-duplicate", place(r, p + 8));
        need(r, is_zero(p + 14, 2), "index-reserved", place(r, p + 14));
        need(r, i == 0 || u32(p) > u32(p - 16), "moe-layer-unsorted", place(r, p));
        need(r, u32(p + 4) > 0, "moe-layer-experts", place(r, p + 4));
    }
}

/* Of the sorted paths, each with a dot, takes the last one that is not above the name. If another one owns the name,
 * then this one lies inside that other module itself, so that fault is found. */
static bool is_owned(const Entry *paths, size_t n, Bytes name) {
    size_t low = 0, high = n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (compare(paths[middle].s, name) <= 0) low = middle + 1;
        else high = middle;
    }
    return low > 0 && paths[low - 1].s.n <= name.n && !memcmp(paths[low - 1].s.p, name.p, paths[low - 1].s.n);
}

static void check_owners(Reader *r) {
    const Block *before = r->blocks;
    uint32_t n = r->n[MOEL];
    Entry *paths = alloc(r, n + 1, sizeof *paths);
    uint8_t *text = alloc(r, n + 1, 513);
    for (uint32_t i = 0; i < n; i++, text += 513) {
        Bytes path = module_at(r, i).path;
        memcpy(text, path.p, path.n);
        text[path.n] = '.';
        paths[i] = (Entry){{text, path.n + 1}, i};
    }
    if (n > 1) qsort(paths, n, sizeof *paths, by_bytes);
    for (uint32_t i = 0; i < r->n[TENS]; i++)
        need(r, !is_owned(paths, n, name_of(r, resident_at(r, i))), "name-inside-experts", place(r, resident_at(r, i)));
    for (uint32_t i = 0; i < n; i++)
        need(r, !is_owned(paths, n, module_at(r, i).path), "name-inside-experts", r->by_type[MOEL]->offset + 16 * i);
    release(r, before);
}

static void check_indexes(Reader *r) {
    r->name_at = alloc(r, (size_t)size_of(r, STRS), sizeof *r->name_at);
    check_files(r);
    check_residents(r);
    check_layouts(r);
    check_modules(r);
    check_owners(r);
    need(r, r->names_end == size_of(r, STRS), "name-fill", r->by_type[STRS]->offset + r->names_end);
}

/* ---- experts (section 12) ---- */

static uint64_t expert_key(const uint8_t *p) { return (uint64_t)u32(p) << 32 | u32(p + 4); }

static uint32_t find_module(const Reader *r, uint32_t layer) { /* n[MOEL] if there is none */
    uint32_t low = 0, high = r->n[MOEL];
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (module_at(r, middle).layer < layer) low = middle + 1;
        else high = middle;
    }
    return low < r->n[MOEL] && module_at(r, low).layer == layer ? low : r->n[MOEL];
}

static bool is_before(const Reader *r, uint32_t i) { /* whether an entry before i has its key; those are sorted */
    uint64_t key = expert_key(expert_at(r, i));
    uint32_t low = 0, high = i;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (expert_key(expert_at(r, middle)) < key) low = middle + 1;
        else high = middle;
    }
    return low < i && expert_key(expert_at(r, low)) == key;
}

static void check_experts(Reader *r) {
    if (!r->n[EXPI]) return;
    uint64_t total = 0, end = r->by_type[SHRD]->offset;
    for (uint32_t i = 0; i < r->n[EXPI]; i++) {
        const uint8_t *p = expert_at(r, i);
        uint32_t m = find_module(r, u32(p));
        need(r, m < r->n[MOEL], "expert-layer", place(r, p));
        need(r, u32(p + 4) < module_at(r, m).experts, "expert-range", place(r, p + 4));
        need(r, !is_before(r, i), "expert-duplicate", place(r, p));
        need(r, i == 0 || expert_key(p) > expert_key(p - 48), "expert-unsorted", place(r, p));
    }
    for (uint32_t i = 0; i < r->n[MOEL]; i++) total += module_at(r, i).experts;
    need(r, total == r->n[EXPI], "expert-missing", r->by_type[EXPI]->offset);
    for (uint32_t i = 0; i < r->n[EXPI]; i++) {
        const uint8_t *p = expert_at(r, i) + 8;
        Record x = check_record(r, p, end, u16(p + 26) < r->n[LAYT], true);
        need(r, x.raw == layout_at(r, x.layout).raw, "record-raw-size", place(r, p + 16));
        end = align(x.offset + x.stored, r->alignment);
    }
    need(r, end == end_of(r, SHRD), "record-range", end);
}

static void check_content(Reader *r) { /* section 3 */
    uint32_t flags = (r->by_type[ASTC] ? 1 : 0) | (r->by_type[SPRS] ? 1 << 5 : 0) | (r->by_type[ANEC] ? 1 << 6 : 0) |
                     (r->by_type[DRFT] ? 1 << 7 : 0);
    for (uint32_t i = 0; i < r->n[TENS] + r->layout_tensors; i++) {
        Tensor t = read_tensor(r, i < r->n[TENS] ? resident_at(r, i) : layout_tensor(r, i - r->n[TENS]));
        if (t.mode == AFFINE && t.bits <= 4) flags |= 1u << (6 - t.bits);
        if (t.mode == MXFP4) flags |= 1 << 8;
    }
    need(r, r->flags == flags, "content-flags", 64);
}

static void check_structure(Reader *r) {
    check_signature(r);
    check_header(r);
    check_directory(r);
    check_sections(r);
    check_head(r);
    check_index_sizes(r);
    check_metadata(r);
    check_indexes(r);
    check_experts(r);
    check_content(r);
}

/* ---- codecs (section 13) ---- */

static uint64_t check_frame_header(Reader *r, const Record *x, uint64_t *window) { /* returns its size */
    static const uint8_t id_bytes[] = {0, 1, 2, 4};
    uint8_t h[18] = {0};
    size_t n = x->stored < sizeof h ? (size_t)x->stored : sizeof h;
    uint64_t at = x->offset;
    read_at(r, at, h, n);
    need(r, n < 4 || (h[0] & 0xF0) != 0x50 || memcmp(h + 1, "\x2A\x4D\x18", 3), "zstd-skippable", at);
    need(r, n >= 4 && !memcmp(h, "\x28\xB5\x2F\xFD", 4), "zstd-magic", at);
    need(r, n >= 5 && (h[4] & 0x18) == 0, "zstd-header", at + 4);
    bool single = h[4] >> 5 & 1;
    size_t size_at = 5 + !single + id_bytes[h[4] & 3], size_bytes = (size_t)1 << (h[4] >> 6);
    if (size_bytes == 1 && !single) size_bytes = 0;
    need(r, n >= size_at + size_bytes, "zstd-header", at + 4);
    need(r, size_bytes > 0, "zstd-size-absent", at + 4);
    uint64_t content = get(h + size_at, (int)size_bytes) + (size_bytes == 2 ? 256 : 0);
    need(r, content == x->raw, "zstd-size-mismatch", at + size_at);
    need(r, (h[4] & 3) == 0, "zstd-dictionary", at + 4);
    need(r, h[4] & 4, "zstd-checksum-missing", at + 4);
    uint64_t base = (uint64_t)1 << (10 + (h[5] >> 3));
    *window = single ? content : base + base / 8 * (h[5] & 7);
    need(r, *window <= 1 << 23, "zstd-window", at + 5);
    return size_at + size_bytes;
}

static void check_frame(Reader *r, const Record *x) {
    uint64_t window, blocks = 0, at = check_frame_header(r, x, &window), most = window < 1 << 17 ? window : 1 << 17;
    for (bool last = false; !last;) {
        uint8_t h[3];
        need(r, at + 3 <= x->stored, "zstd-truncated", x->offset + at);
        read_at(r, x->offset + at, h, 3);
        uint32_t b = (uint32_t)get(h, 3), type = b >> 1 & 3, size = b >> 3;
        need(r, type != 3 && size <= most, "zstd-block", x->offset + at);
        need(r, ++blocks <= 16 + x->stored / 64, "zstd-blocks", x->offset + at);
        at += 3 + (type == 1 ? 1 : size);
        last = b & 1;
    }
    need(r, at + 4 <= x->stored, "zstd-truncated", x->offset + at);
    need(r, at + 4 == x->stored, "zstd-trailing", x->offset + at + 4);
}

typedef void Sink(Reader *r, void *to, uint64_t base, const uint8_t *p, size_t n);

/* Gives the decoded bytes to the sink in pieces of PIECE bytes (the last may be shorter). */
static void decode_raw(Reader *r, const Record *x, Sink *sink, void *to) {
    uint64_t base = 0;
    for (size_t n; base < x->raw; base += n) {
        n = piece_of(x->raw - base);
        read_at(r, x->offset + base, in_piece, n);
        sink(r, to, base, in_piece, n);
    }
}

#ifdef NO_ZSTD
static bool decode_zstd(Reader *r, const Record *x, Sink *sink, void *to) {
    (void)x, (void)sink, (void)to;
    r->undecoded++;
    return false;
}
#else
static bool decode_zstd(Reader *r, const Record *x, Sink *sink, void *to) {
    ZSTD_inBuffer in = {in_piece, 0, 0};
    ZSTD_outBuffer out = {out_piece, PIECE, 0};
    uint64_t taken = 0, base = 0;
    if (!unzstd && !(unzstd = ZSTD_createDCtx())) cannot(r, "out of memory");
    ZSTD_DCtx_reset(unzstd, ZSTD_reset_session_only);
    for (size_t more = 1; more;) {
        if (in.pos == in.size && taken < x->stored) {
            in = (ZSTD_inBuffer){in_piece, piece_of(x->stored - taken), 0};
            read_at(r, x->offset + taken, in_piece, in.size);
            taken += in.size;
        }
        size_t in_before = in.pos, out_before = out.pos;
        more = ZSTD_decompressStream(unzstd, &out, &in);
        if (ZSTD_isError(more))
            fail(r, ZSTD_getErrorCode(more) == ZSTD_error_checksum_wrong ? "zstd-checksum" : "zstd-corrupt", x->offset);
        need(r, !more || in.pos > in_before || out.pos > out_before, "zstd-corrupt", x->offset);
        need(r, out.pos <= x->raw - base, "zstd-corrupt", x->offset);
        if (out.pos < PIECE && more) continue;
        if (sink) sink(r, to, base, out_piece, out.pos);
        base += out.pos;
        out.pos = 0;
    }
    need(r, base == x->raw && in.pos == in.size && taken == x->stored, "zstd-corrupt", x->offset);
    return true;
}
#endif

/* False if this program is without zstd. */
static bool decode(Reader *r, const Record *x, Sink *sink, void *to) {
    if (x->codec) return decode_zstd(r, x, sink, to);
    if (sink) decode_raw(r, x, sink, to);
    return true;
}

/* ---- values (sections 14 and 15) ---- */

static double pow2(int e) { /* -1022 to 1023 */
    uint64_t bits = (uint64_t)(e + 1023) << 52;
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

static float to_f32(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float f16(uint32_t h) {
    uint32_t e = h >> 10 & 31, m = h & 1023, sign = h >> 15 << 31;
    if (e == 31) return to_f32(sign | 0x7F800000 | m << 13);
    double x = e ? (1024 + m) * pow2((int)e - 25) : m * pow2(-24);
    return (float)(sign ? -x : x);
}

static float real(const uint8_t *p, unsigned dtype) {
    return dtype == F32 ? to_f32(u32(p)) : dtype == F16 ? f16(u16(p)) : to_f32(u16(p) << 16);
}

static double e4m3(unsigned c) {
    int e = c >> 3 & 15, m = c & 7;
    double x = e ? (8 + m) * pow2(e - 10) : m * pow2(-9);
    return c >> 7 ? -x : x;
}

static double e2m1(unsigned c) {
    static const double values[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return c >> 3 ? -values[c & 7] : values[c & 7];
}

static float dequantize(const Tensor *t, const uint8_t *raw, uint64_t i) {
    const uint8_t *codes = raw + t->offset[0], *scales = raw + t->offset[1], *biases = raw + t->offset[2];
    unsigned bytes = DTYPE_BYTES[t->dtype], q = 0;
    if (t->mode == RAW) return real(codes + i * bytes, t->dtype);
    uint64_t g = i / t->group;
    for (unsigned k = 0; k < t->bits; k++) {
        uint64_t bit = i * t->bits + k;
        q |= (codes[bit >> 3] >> (bit & 7) & 1u) << k;
    }
    if (t->mode == AFFINE) {
        float product = real(scales + g * bytes, t->dtype) * (float)q;
        return product + real(biases + g * bytes, t->dtype);
    }
    if (t->mode == NVFP4) return (float)(e2m1(q) * e4m3(scales[g]));
    return (float)((t->mode == MXFP4 ? e2m1(q) : e4m3(q)) * pow2(scales[g] - 127));
}

/* What is wrong with the values of a record, found piece by piece. */
enum { BAD_SCALE = 1, BAD_BIAS = 2, BAD_E8M0 = 4, BAD_E4M3 = 8, OVERFLOWS = 16 };
typedef struct {
    const uint8_t *table; /* entries of the tensors */
    uint32_t count, at, part;
    Tensor t;
    uint64_t end;         /* of the part before */
    unsigned bad;         /* faults of tensor t */
    double top[3];        /* largest magnitude of its scales [1] and biases [2] */
    bool padding;
    const char *fault;    /* of the first tensor that has one */
} Scan;

static void scan_reals(Scan *s, const uint8_t *p, uint64_t n) {
    unsigned bytes = DTYPE_BYTES[s->t.dtype];
    for (uint64_t i = 0; i < n; i += bytes) {
        double x = real(p + i, s->t.dtype);
        if (!isfinite(x)) s->bad |= s->part == 1 ? BAD_SCALE : BAD_BIAS;
        else if (fabs(x) > s->top[s->part]) s->top[s->part] = fabs(x);
    }
}

static void scan_part(Scan *s, const uint8_t *p, uint64_t n) {
    unsigned mode = s->t.mode;
    bool e4m3_part = s->part == 0 ? mode == MXFP8 : mode == NVFP4, e8m0_part = s->part == 1 && !e4m3_part;
    int largest = (mode == MXFP4 ? 252 : 246) - (s->t.dtype == F16 ? 112 : 0);
    if (mode == RAW || (s->part == 0 && !e4m3_part)) return;
    if (mode == AFFINE) {
        scan_reals(s, p, n);
        return;
    }
    for (uint64_t i = 0; i < n; i++) {
        if (e4m3_part && (p[i] & 0x7F) == 0x7F) s->bad |= BAD_E4M3;
        if (e8m0_part && p[i] == 0xFF) s->bad |= BAD_E8M0;
        if (e8m0_part && p[i] > largest) s->bad |= OVERFLOWS;
    }
}

static void scan_tensor_end(Scan *s) {
    static const char *const codes[] = {"scale-not-finite", "bias-not-finite", "e8m0-nan", "e4m3-nan",
                                        "value-overflow"};
    double most = s->t.dtype == F16 ? 65504 : s->t.dtype == BF16 ? (2 - pow2(-7)) * pow2(127) : FLT_MAX;
    if (s->t.mode == AFFINE && s->top[1] * ((1 << s->t.bits) - 1) + s->top[2] > most) s->bad |= OVERFLOWS;
    for (int i = 0; i < 5 && !s->fault; i++)
        if (s->bad >> i & 1) s->fault = codes[i];
    s->bad = 0;
    s->top[1] = s->top[2] = 0;
}

static uint64_t clamp(uint64_t x, uint64_t low, uint64_t high) { return x < low ? low : x > high ? high : x; }

static void scan_piece(Reader *r, void *to, uint64_t base, const uint8_t *p, size_t n) {
    Scan *s = to;
    size_t stride = r->by_type[LAYT] && s->table >= layout_tensor(r, 0) ? 96 : 136;
    uint64_t stop = base + n;
    while (s->at < s->count) {
        if (s->part == 0) s->t = read_tensor(r, s->table + s->at * stride);
        uint64_t from = s->t.offset[s->part], end = from + s->t.size[s->part];
        if (end > from) {
            uint64_t a = clamp(s->end, base, stop), b = clamp(from, base, stop), c = clamp(end, base, stop);
            if (b > a && !is_zero(p + (a - base), b - a)) s->padding = true;
            if (from >= stop) return;
            scan_part(s, p + (b - base), c - b);
            if (end > stop) return;
            s->end = end;
        }
        if (++s->part == 3) {
            scan_tensor_end(s);
            s->part = 0;
            s->at++;
        }
    }
}

/* ---- payload ---- */

static void check_stored(Reader *r, const Record *x) {
    need(r, digest_of(r, x->offset, x->stored) == x->digest, "record-digest", x->offset);
    if (x->codec) check_frame(r, x);
}

static void check_values(Reader *r, const Record *x, const uint8_t *table, uint32_t count) {
    Scan s = {.table = table, .count = count};
    check_stored(r, x);
    if (!decode(r, x, scan_piece, &s)) return;
    need(r, !s.padding, "padding-nonzero", x->offset);
    if (s.fault) fail(r, s.fault, x->offset);
}

static void check_expert_values(Reader *r, const Record *x) {
    Layout l = layout_at(r, x->layout);
    check_values(r, x, layout_tensor(r, l.first), l.count);
}

static uint64_t check_payload(Reader *r) { /* returns where the data sections end */
    uint64_t end = r->head_size;
    for (uint32_t i = 0; i < r->n[FILE_]; i++) {
        Record x = read_record(file_at(r, i) + 8);
        check_padding(r, end, x.offset);
        check_stored(r, &x);
        decode(r, &x, NULL, NULL);
        end = x.offset + x.stored;
    }
    for (uint32_t i = 0; i < r->n[TENS]; i++) {
        Record x = read_record(resident_at(r, i) + 96);
        check_padding(r, end, x.offset);
        check_values(r, &x, resident_at(r, i), 1);
        end = x.offset + x.stored;
    }
    for (uint32_t i = 0; i < r->n[EXPI]; i++) {
        Record x = read_record(expert_at(r, i) + 8);
        check_padding(r, end, x.offset);
        check_expert_values(r, &x);
        end = x.offset + x.stored;
    }
    if (!r->by_type[SHRD]) return end;
    check_padding(r, end, end_of(r, SHRD));
    return end_of(r, SHRD);
}

/* ---- appendices (section 17) ---- */

typedef struct { const Section *s; bool header_done, other_version; int64_t tokens; uint32_t module, expert; } Appendix;

static void check_coactivation(Reader *r, const Node *pairs, const Node *counts, int64_t experts) {
    int64_t last_a = -1, last_b = -1;
    for (const Node *p = first(r, pairs); p; p = next(r, p)) {
        int64_t a = p[1].i, b = p[2].i, n = p[3].i; /* three integers: the nodes that follow */
        bool good = a >= 0 && a < b && b < experts && (a > last_a || (a == last_a && b > last_b));
        good = good && n >= 1 && n <= counts[1 + a].i && n <= counts[1 + b].i;
        need(r, good, "profile-coactivation", document_place(r, p->at));
        last_a = a;
        last_b = b;
    }
}

static void check_profile_line(Reader *r, Appendix *a, const Node *root) {
    static const char code[] = "profile-type";
    need(r, a->module < r->n[MOEL], "profile-layers", r->document_at);
    need(r, has_type(root, T_OBJECT), code, r->document_at);
    const Node *layer = required(r, root, "layer", T_COUNT, code);
    const Node *counts = array(r, root, "counts", T_INTEGER, code), *mass = array(r, root, "gate_mass", T_NUMBER, code);
    const Node *pairs = member(r, root, "coactivation") ? array(r, root, "coactivation", T_ARRAY, code) : NULL;
    for (const Node *p = pairs ? first(r, pairs) : NULL; p; p = next(r, p)) {
        need(r, p->count == 3, code, document_place(r, p->at));
        for (const Node *m = first(r, p); m; m = next(r, m))
            need(r, has_type(m, T_INTEGER), code, document_place(r, m->at));
    }
    Module m = module_at(r, a->module);
    bool fits = layer->i == m.layer && counts->count == m.experts && mass->count == m.experts;
    need(r, fits, "profile-layers", document_place(r, layer->at));
    for (const Node *c = first(r, counts); c; c = next(r, c))
        need(r, c->i >= 0 && c->i <= a->tokens, "profile-count", document_place(r, c->at));
    for (const Node *c = first(r, counts), *g = first(r, mass); g; c = next(r, c), g = next(r, g))
        need(r, c->i ? g->d >= 0 : g->d == 0, "profile-mass", document_place(r, g->at));
    if (pairs) check_coactivation(r, pairs, counts, m.experts);
    a->module++;
}

static bool width_fits(const Reader *r, const Record *x, int64_t width) {
    Layout l = layout_at(r, x->layout);
    for (uint32_t j = 0; j < l.count; j++) {
        Tensor t = read_tensor(r, layout_tensor(r, l.first + j));
        bool up = equals(t.name, "up_proj.weight") || equals(t.name, "fc1.weight");
        if (up && t.shape[0] != (uint64_t)width) return false;
    }
    return true;
}

static void check_sparse_expert(Reader *r, const Node *e, const Record *x, int64_t width) {
    const Node *boundaries = member(r, e, "boundaries"), *histogram = member(r, e, "histogram");
    int64_t clusters = member(r, e, "clusters")->i, last = -1;
    uint64_t at = document_place(r, e->at);
    char digest[17];
    need(r, width_fits(r, x, width), "sparsity-width", at);
    need(r, clusters >= 1 && clusters <= width, "sparsity-clusters", at);
    bool good = boundaries->count == clusters + 1 && first(r, boundaries)->i == 0;
    for (const Node *b = first(r, boundaries); b; last = b->i, b = next(r, b)) good = good && b->i > last;
    need(r, good && last == width, "sparsity-boundaries", at);
    good = histogram->count == clusters;
    for (const Node *h = first(r, histogram); h; h = next(r, h)) good = good && h->d >= 0 && h->d <= 1;
    need(r, good, "sparsity-histogram", at);
    snprintf(digest, sizeof digest, "%016" PRIx64, x->digest);
    need(r, equals(member(r, e, "digest")->text, digest), "sparsity-digest", at);
}

static void check_sparsity_line(Reader *r, Appendix *a, const Node *root) {
    static const char code[] = "sparsity-type";
    need(r, a->module < r->n[MOEL], "sparsity-layers", r->document_at);
    need(r, has_type(root, T_OBJECT), code, r->document_at);
    const Node *layer = required(r, root, "layer", T_COUNT, code), *width = required(r, root, "width", T_COUNT, code);
    const Node *experts = array(r, root, "experts", T_OBJECT, code);
    for (const Node *e = first(r, experts); e; e = next(r, e)) {
        required(r, e, "clusters", T_INTEGER, code);
        array(r, e, "boundaries", T_INTEGER, code);
        array(r, e, "histogram", T_NUMBER, code);
        required(r, required(r, e, "predictor", T_OBJECT, code), "kind", T_STRING, code);
        required(r, e, "digest", T_DIGEST, code);
    }
    Module m = module_at(r, a->module);
    bool fits = layer->i == m.layer && experts->count == m.experts;
    need(r, fits, "sparsity-layers", document_place(r, layer->at));
    for (const Node *e = first(r, experts); e; e = next(r, e)) {
        Record x = read_record(expert_at(r, a->expert++) + 8);
        check_sparse_expert(r, e, &x, width->i);
    }
    a->module++;
}

/* The next tensor of role draft from i on, n[TENS] if there is none. */
static uint32_t next_draft(const Reader *r, uint32_t i) {
    while (i < r->n[TENS] && u16(resident_at(r, i) + 6) != ROLE_DRAFT) i++;
    return i;
}

static void check_draft(Reader *r, const Node *root) {
    static const char code[] = "draft-type";
    required(r, root, "kind", T_STRING, code);
    const Node *hidden = required(r, root, "hidden", T_COUNT, code);
    const Node *layers = array(r, root, "source_layers", T_INTEGER, code);
    const Node *tensors = array(r, root, "tensors", T_OBJECT, code);
    for (const Node *t = first(r, tensors); t; t = next(r, t)) {
        required(r, t, "name", T_STRING, code);
        required(r, t, "digest", T_DIGEST, code);
    }
    need(r, !r->has_hidden || hidden->i == r->hidden, "draft-hidden", document_place(r, hidden->at));
    int64_t last = -1;
    need(r, layers->count > 0, "draft-source-layer", document_place(r, layers->at));
    for (const Node *l = first(r, layers); l; last = l->i, l = next(r, l))
        need(r, l->i > last && (!r->has_layers || l->i < r->layers), "draft-source-layer", document_place(r, l->at));
    uint32_t i = next_draft(r, 0);
    for (const Node *t = first(r, tensors); t; t = next(r, t), i = next_draft(r, i + 1)) {
        bool same = i < r->n[TENS] && !compare(member(r, t, "name")->text, name_of(r, resident_at(r, i)));
        need(r, same, "draft-tensors", document_place(r, t->at));
    }
    need(r, i >= r->n[TENS], "draft-tensors", document_place(r, tensors->at));
    i = next_draft(r, 0);
    for (const Node *t = first(r, tensors); t; t = next(r, t), i = next_draft(r, i + 1)) {
        char digest[17];
        snprintf(digest, sizeof digest, "%016" PRIx64, read_record(resident_at(r, i) + 96).digest);
        need(r, equals(member(r, t, "digest")->text, digest), "draft-digest", document_place(r, t->at));
    }
}

static void check_appendix_header(Reader *r, Appendix *a, const Node *root) {
    static const char *const names[] = {"profile", "sparsity", "draft"};
    static const char code[] = "appendix-header";
    need(r, has_type(root, T_OBJECT), code, r->document_at);
    const Node *name = required(r, root, "appendix", T_STRING, code);
    need(r, equals(name->text, names[a->s->type - PROF]), code, document_place(r, name->at));
    a->other_version = required(r, root, "version", T_COUNT, code)->i != 1;
    if (a->other_version) return;
    if (a->s->type == PROF) {
        a->tokens = required(r, root, "tokens", T_COUNT, "profile-type")->i;
        required(r, root, "text_sha256", T_SHA256, "profile-type");
    }
    if (a->s->type == DRFT) check_draft(r, root);
}

static void check_line(Reader *r, Appendix *a) {
    const Block *before = r->blocks;
    const Node *root = parse_document(r);
    if (!a->header_done) check_appendix_header(r, a, root);
    else if (a->other_version) ;
    else if (a->s->type == PROF) check_profile_line(r, a, root);
    else if (a->s->type == SPRS) check_sparsity_line(r, a, root);
    else fail(r, "draft-type", r->document_at);
    a->header_done = true;
    release(r, before);
}

static void split_lines(Reader *r, void *to, uint64_t base, const uint8_t *p, size_t n) {
    Appendix *a = to;
    for (size_t i = 0; i < n; i++) {
        const uint8_t *end = memchr(p + i, '\n', n - i);
        size_t k = end ? (size_t)(end - p) - i : n - i;
        need(r, k <= MAX_DOCUMENT - r->line_size, "appendix-line", r->document_at);
        line_add(r, p + i, k);
        i += k;
        if (!end) break;
        check_line(r, a);
        r->line_size = 0;
        if (!r->document_coded) r->document_at = a->s->offset + base + i + 1;
    }
}

static void check_lines(Reader *r, const Section *s, const Record *x) {
    Appendix a = {.s = s};
    r->document_at = s->offset;
    r->document_coded = s->codec;
    r->line_size = 0;
    if (!decode(r, x, split_lines, &a)) return;
    need(r, r->line_size == 0, "appendix-line", r->document_at);
    if (s->type == DRFT || a.other_version) return;
    need(r, a.module == r->n[MOEL], s->type == PROF ? "profile-layers" : "sparsity-layers", s->offset);
}

static void check_appendices(Reader *r, uint64_t end) {
    for (uint32_t i = 0; i < r->count; i++) {
        const Section *s = &r->sections[i];
        Record x = {s->offset, s->stored, s->raw, s->digest, s->codec, 0};
        if (s->type <= SHRD) continue;
        check_padding(r, end, s->offset);
        need(r, digest_of(r, s->offset, s->stored) == s->digest, "section-digest", s->offset);
        if (s->codec) check_frame(r, &x);
        decode(r, &x, NULL, NULL);
        if (s->type <= DRFT) check_lines(r, s, &x);
        end = s->offset + s->stored;
    }
    uint32_t draft = next_draft(r, 0);
    if (!r->by_type[DRFT] && draft < r->n[TENS]) fail(r, "draft-tensors", place(r, resident_at(r, draft)));
}

/* ---- commands ---- */

static void print_name(Bytes s) { /* section 24: names may hold anything printable */
    for (size_t i = 0; i < s.n; i++)
        if (s.p[i] > 0x20 && s.p[i] < 0x7F && s.p[i] != '\\') putchar(s.p[i]);
        else printf("\\x%02x", s.p[i]);
}

static void print_shape(const Tensor *t) {
    for (unsigned i = 0; i < t->ndim; i++) printf("%s%" PRIu64, i ? "x" : " ", t->shape[i]);
    putchar('\n');
}

static void print_tensor(const char *what, const Tensor *t) {
    printf("%s ", what);
    print_name(t->name);
    printf(" %s %s %s bits %u group %" PRIu32, ROLES[t->role], MODES[t->mode], DTYPES[t->dtype], t->bits, t->group);
    print_shape(t);
}

static void sha_sink(Reader *r, void *to, uint64_t base, const uint8_t *p, size_t n) {
    (void)r, (void)base;
    sha_add(to, p, n);
}

static void print_sha256(Reader *r, const Record *x) {
    Sha s;
    sha_start(&s);
    printf(" sha256 ");
    if (decode(r, x, sha_sink, &s)) sha_print(&s);
    else printf("unknown (no zstd)");
    putchar('\n');
}

static void list_sections(Reader *r) {
    Sha id;
    sha_start(&id);
    sha_add(&id, r->head, (size_t)r->head_size);
    printf("file_id ");
    sha_print(&id);
    printf("\nflags 0x%" PRIx32 "\n", r->flags);
    if (r->set_count > 1)
        printf("set member %" PRId64 " of %" PRId64 ": this program reads no sets\n", r->set_index, r->set_count);
    for (uint32_t i = 0; i < r->count; i++) {
        const Section *s = &r->sections[i];
        printf("section %s offset %" PRIu64 " stored %" PRIu64 " raw %" PRIu64 " codec %u", s->name, s->offset,
               s->stored, s->raw, s->codec);
        Record x = {s->offset, s->stored, s->raw, s->digest, s->codec, 0};
        if (s->type <= SHRD) {
            putchar('\n');
            continue;
        }
        need(r, digest_of(r, s->offset, s->stored) == s->digest, "section-digest", s->offset);
        if (s->codec) check_frame(r, &x);
        print_sha256(r, &x);
    }
}

static void list(Reader *r, char **args) {
    (void)args;
    check_structure(r);
    list_sections(r);
    for (uint32_t i = 0; i < r->n[FILE_]; i++) {
        Record x = read_record(file_at(r, i) + 8);
        check_stored(r, &x);
        printf("file ");
        print_name(name_of(r, file_at(r, i)));
        printf(" size %" PRIu64, x.raw);
        print_sha256(r, &x);
    }
    for (uint32_t i = 0; i < r->n[TENS]; i++) {
        Tensor t = read_tensor(r, resident_at(r, i));
        print_tensor("tensor", &t);
    }
    for (uint32_t i = 0; i < r->n[LAYT]; i++) {
        Layout l = layout_at(r, i);
        printf("layout %" PRIu32 " raw %" PRIu64 " tensors %" PRIu32 "\n", i, l.raw, l.count);
        for (uint32_t j = 0; j < l.count; j++) {
            Tensor t = read_tensor(r, layout_tensor(r, l.first + j));
            print_tensor("layout-tensor", &t);
        }
    }
    for (uint32_t i = 0; i < r->n[MOEL]; i++) {
        Module m = module_at(r, i);
        printf("layer %" PRIu32 " experts %" PRIu32 " path ", m.layer, m.experts);
        print_name(m.path);
        putchar('\n');
    }
    for (uint32_t i = 0; i < r->n[EXPI]; i++) {
        Record x = read_record(expert_at(r, i) + 8);
        printf("expert %" PRIu32 " %" PRIu32 " layout %u", u32(expert_at(r, i)), u32(expert_at(r, i) + 4), x.layout);
        printf(" offset %" PRIu64 " stored %" PRIu64 " raw %" PRIu64 " codec %u\n", x.offset, x.stored, x.raw, x.codec);
    }
}

static void verify(Reader *r, char **args) {
    (void)args;
    check_structure(r);
    check_appendices(r, check_payload(r));
    if (r->undecoded) cannot(r, "built without zstd, and it has zstd frames; no fault in what could be checked");
}

static void keep(Reader *r, void *to, uint64_t base, const uint8_t *p, size_t n) {
    (void)r;
    memcpy((uint8_t *)to + base, p, n);
}

static uint8_t *load(Reader *r, const Record *x) {
    uint8_t *raw = alloc(r, (size_t)x->raw, 1);
    if (!decode(r, x, keep, raw)) cannot(r, "a zstd record, and built without zstd");
    return raw;
}

static void print_integer(const uint8_t *p, unsigned dtype) {
    unsigned bytes = DTYPE_BYTES[dtype];
    uint64_t x = get(p, (int)bytes);
    uint64_t sign = (uint64_t)1 << (8 * bytes - 1);
    if (dtype % 2 == 1 && x & sign) printf("-%" PRIu64 "\n", (sign - (x & (sign - 1))));
    else printf("%" PRIu64 "\n", x);
}

static void print_values(const Tensor *t, const uint8_t *raw) {
    uint64_t n = 1;
    for (unsigned i = 0; i < t->ndim; i++) n *= t->shape[i];
    for (uint64_t i = 0; i < n; i++)
        if (t->dtype > BF16) print_integer(raw + t->offset[0] + i * DTYPE_BYTES[t->dtype], t->dtype);
        else printf("%a\n", (double)dequantize(t, raw, i));
}

static void print_resident(Reader *r, char **args) {
    check_structure(r);
    for (uint32_t i = 0; i < r->n[TENS]; i++) {
        const uint8_t *p = resident_at(r, i);
        Record x = read_record(p + 96);
        if (!equals(name_of(r, p), args[0])) continue;
        check_values(r, &x, p, 1);
        Tensor t = read_tensor(r, p);
        const uint8_t *raw = load(r, &x);
        printf("shape");
        print_shape(&t);
        print_values(&t, raw);
        return;
    }
    cannot(r, r->set_count > 1 ? "no such tensor in this member of a set" : "no such tensor");
}

static uint64_t number(Reader *r, const char *text) {
    char *end;
    uint64_t x = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end) cannot(r, "layer and expert must be numbers");
    return x;
}

static void print_expert(Reader *r, char **args) {
    uint64_t layer = number(r, args[0]), expert = number(r, args[1]);
    check_structure(r);
    for (uint32_t i = 0; i < r->n[EXPI]; i++) {
        const uint8_t *p = expert_at(r, i);
        Record x = read_record(p + 8);
        if (u32(p) != layer || u32(p + 4) != expert) continue;
        check_expert_values(r, &x);
        Layout l = layout_at(r, x.layout);
        const uint8_t *raw = load(r, &x);
        for (uint32_t j = 0; j < l.count; j++) {
            Tensor t = read_tensor(r, layout_tensor(r, l.first + j));
            printf("tensor ");
            print_name(t.name);
            printf(" shape");
            print_shape(&t);
            print_values(&t, raw);
        }
        return;
    }
    cannot(r, r->set_count > 1 ? "no such expert in this member of a set" : "no such expert");
}

/* ---- */

static Reader the_reader;

static void open_file(Reader *r, const char *path) {
    struct stat st;
    r->fd = open(path, O_RDONLY | O_NONBLOCK); /* a pipe would block */
    if (r->fd < 0) cannot(r, "cannot open");
    if (fstat(r->fd, &st) || !S_ISREG(st.st_mode)) cannot(r, "not a regular file");
    r->size = (uint64_t)st.st_size;
}

/* Runs a command on a file; returns the exit code. A verdict is printed for verify only, or if it is bad. */
static int process(const char *path, void (*command)(Reader *, char **), char **args, const char *prefix) {
    Reader *r = &the_reader;
    memset(r, 0, sizeof *r);
    r->fd = -1;
    int result = setjmp(r->out);
    if (result == 0) {
        open_file(r, path);
        command(r, args);
    }
    const char *colon = *prefix ? ": " : "";
    if (result == 1) printf("%s%sinvalid %s %" PRIu64 "\n", prefix, colon, r->code, r->at);
    if (result == 2) fprintf(*prefix ? stdout : stderr, "%s: cannot read: %s\n", path, r->code);
    if (result == 0 && command == verify) printf("%s%svalid\n", prefix, colon);
    release(r, NULL);
    free(r->line);
    if (r->fd >= 0) close(r->fd);
    return result;
}

int main(int argc, char **argv) {
    const char *command = argc > 2 ? argv[1] : "";
    int worst = 2;
    if (!strcmp(command, "list") && argc == 3) {
        worst = process(argv[2], list, argv, "");
    } else if (!strcmp(command, "tensor") && argc == 4) {
        worst = process(argv[2], print_resident, argv + 3, "");
    } else if (!strcmp(command, "expert") && argc == 5) {
        worst = process(argv[2], print_expert, argv + 3, "");
    } else if (!strcmp(command, "verify")) {
        worst = 0;
        for (int i = 2; i < argc; i++) {
            int result = process(argv[i], verify, argv, argc > 3 ? argv[i] : "");
            if (result > worst) worst = result;
        }
    } else {
        fprintf(stderr, "usage: reader list|verify FILE, tensor FILE NAME, expert FILE LAYER EXPERT; verify takes "
                        "several files\n");
    }
#ifndef NO_ZSTD
    ZSTD_freeDCtx(unzstd);
#endif
    return worst;
}
