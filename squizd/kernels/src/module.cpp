// What Python sees of the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include "codes.h"
#include "mlx/version.h"
#include "operations.h"
#include "program.h"

namespace squizd {
namespace {

using Bank = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Python's hold on a program. A shared_ptr of nanobind's would take Python's lock to let go, which MLX's thread must not.
struct HeldProgram {
  std::shared_ptr<Program> program;
};

// Keeps the banks that a shelf writes to.
struct HeldShelf {
  std::shared_ptr<Shelf> shelf;
  std::vector<Bank> banks;
};

using PythonRules = std::tuple<std::vector<uint64_t>, std::vector<uint64_t>, uint64_t, int>;

// (bank, offset, size, widening of floats, bits of codes as stored and in the bank: 0 if they are copied), in the order of offsets
using PythonPart = std::tuple<size_t, size_t, size_t, std::string, int, int>;
// (offset, size, XXH64, layout)
using PythonRecord = std::tuple<uint64_t, uint64_t, uint64_t, size_t>;

// layouts: the parts of each; records: of each expert; rules: Rules' members in their order; step: Records'
HeldShelf make_shelf(const std::string& name, int fd, int layer, std::vector<Bank> banks,
                     const std::vector<std::vector<PythonPart>>& layouts, const std::vector<PythonRecord>& records,
                     const PythonRules& rules, size_t step) {
  if (banks.empty()) throw std::invalid_argument("no banks");
  const size_t slots = banks[0].shape(0);
  std::vector<std::vector<Part>> ours;
  for (const auto& parts : layouts) {
    if (banks.size() != parts.size()) throw std::invalid_argument("one bank for each part");
    auto& mine = ours.emplace_back();
    for (const auto& [index, offset, size, floats, narrow, wide] : parts) {
      const bool codes = narrow != wide;
      const Widen how = codes ? CODES : floats == "bf16" ? FROM_BF16 : floats == "f16" ? FROM_F16 : AS_STORED;
      if ((how == AS_STORED && !floats.empty()) || (codes && !widens(narrow, wide))) throw std::invalid_argument("unknown widening");
      const Bank& bank = banks.at(index);
      const size_t row = codes ? size / size_t(narrow) * size_t(wide) : how ? 2 * size : size;
      if (bank.shape(0) != slots || bank.shape(1) != row) throw std::invalid_argument("a bank of another size");
      mine.push_back({offset, size, how, bank.data(), row, narrow, wide});
    }
  }
  std::vector<Extent> extents;
  for (const auto& [offset, size, digest, layout] : records) extents.push_back({offset, size, digest, layout});
  return {std::make_shared<Shelf>(name, fd, layer, ours, std::move(extents), int(slots),
                                  Rules{std::get<0>(rules), std::get<1>(rules), std::get<2>(rules), std::get<3>(rules)}, step),
          std::move(banks)};
}

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<uint32_t, nb::c_contig, nb::device::cpu>;

// Fit the affine blocks of w [rows, cols] in place; see Fit.
void fit(const Floats& w, const Floats& decoded, Words& codes, Floats& scales, Floats& biases, const std::optional<Floats>& weight,
         size_t first_row, size_t rows_per_weight, int group, int bits, const std::string& type, const std::vector<double>& offsets,
         const std::vector<double>& distances, int rounds, const std::vector<float>& factors, float margin) {
  if (w.ndim() != 2 || group < 32 || group > MAX_GROUP || w.shape(1) % size_t(group)) throw std::invalid_argument("w or group");
  const size_t rows = w.shape(0), cols = w.shape(1), groups = rows * (cols / size_t(group));
  if (decoded.size() != w.size() || scales.size() != groups || biases.size() != groups || codes.size() != w.size() * size_t(bits) / 32)
    throw std::invalid_argument("parts of other sizes");
  if (weight && (!rows_per_weight || weight->size() < cols * ((first_row + rows - 1) / rows_per_weight + 1)))
    throw std::invalid_argument("weight of another size");
  const Fit job = {w.data(), decoded.data(), codes.data(), scales.data(), biases.data(), weight ? weight->data() : nullptr,
                   first_row, rows_per_weight, int(cols), group, bits,
                   type == "bf16" ? Fit::BF16 : type == "f16" ? Fit::F16 : Fit::F32,
                   int(offsets.size()), int(distances.size()), rounds, int(factors.size()),
                   offsets.data(), distances.data(), factors.data(), margin};
  nb::gil_scoped_release unlocked;
  const Engine e = engine();
  const size_t step = LANES * 8, tasks = (groups + step - 1) / step;
  e.pool.run(int(tasks), false, [&](int task, int) {
    for (size_t at = size_t(task) * step; at < groups && at < (size_t(task) + 1) * step; at += LANES)
      e.math.fit(job, at, int(groups - at < LANES ? groups - at : LANES));
  });
}

PyObject* failed_read = nullptr;  // the class to raise, with (path, layer, expert, offset, reason)

// MLX hands on only the message of what went wrong in its threads: here it becomes the exception that it was.
void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const std::runtime_error& error) {
    const Failure f = failure_of(error.what());
    if (!failed_read || f.message.empty()) throw;
    nb::object value = nb::borrow(failed_read)(f.path, f.layer, f.expert, f.offset, f.reason);
    PyErr_SetObject(failed_read, value.ptr());
  }
}

}  // namespace
}  // namespace squizd

NB_MODULE(_native, m) {
  using namespace squizd;
  nb::module_::import_("mlx.core");
  m.attr("mlx_version") = std::to_string(MLX_VERSION_MAJOR) + "." + std::to_string(MLX_VERSION_MINOR) + "." + std::to_string(MLX_VERSION_PATCH);
  m.attr("sources") = SQUIZD_SOURCES;
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (auto* const* i = ALL; *i; i++)
      if (usable(**i)) names.push_back((*i)->name);
    return names;
  }, "Those that this processor has, best first.");
  m.def("use", [](const std::string& name) {
    for (auto* const* i = ALL; *i; i++)
      if (usable(**i) && name == (*i)->name) {
        machine().math = *i;
        return true;
      }
    return false;
  }, nb::arg("instruction_set"));
  m.def("in_use", [] { return std::string(machine().math->name); });
  m.def("set_threads", [](int n) { machine().pool = std::make_unique<Pool>(n); }, nb::arg("count"));
  m.def("threads", [] { return machine().pool->workers(); });
  m.def("fit", &fit, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  m.def("linear", &lazy::linear);
  m.def("expert_linear", &lazy::expert_linear);
  m.def("swiglu_experts", &lazy::swiglu_experts);
  m.def("embed", &lazy::embed);
  m.def("append", &lazy::append);
  m.def("rms_norm", &lazy::rms_norm, nb::arg(), nb::arg().none(), nb::arg());
  m.def("rope", &lazy::rope);
  m.def("attention", &lazy::attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none());

  nb::register_exception_translator(translate);
  m.def("on_failed_read", [](nb::object kind) { failed_read = kind.release().ptr(); });
  m.def("xxh64", [](nb::bytes data) { return xxh64(static_cast<const uint8_t*>(data.data()), data.size()); });
  nb::class_<HeldShelf>(m, "Shelf")
      .def("__init__", [](HeldShelf* self, const std::string& name, int fd, int layer, std::vector<Bank> banks,
                          const std::vector<std::vector<PythonPart>>& layouts, const std::vector<PythonRecord>& records,
                          const PythonRules& rules, size_t step) {
        new (self) HeldShelf(make_shelf(name, fd, layer, std::move(banks), layouts, records, rules, step));
      })
      .def("order", [](const HeldShelf& s) { return s.shelf->order(); })
      .def("state", [](const HeldShelf& s) {
        const Recall& r = s.shelf->recall();
        return std::make_tuple(r.counts(), r.token(), r.history(), r.choices());
      })
      .def("arrange", [](HeldShelf& s, const std::vector<std::pair<int, int>>& order, const std::vector<uint64_t>& counts, int token,
                         const std::vector<uint32_t>& history, int choices) { s.shelf->arrange(order, counts, token, history, choices); })
      .def("place", [](HeldShelf& s, const std::vector<uint32_t>& ids) {  // for tests: a replayed token calls it without Python
        std::vector<uint32_t> slots(ids.size());
        s.shelf->place(ids.data(), int(ids.size()), slots.data(), *machine().pool);
        return slots;
      })
      .def("expect", [](HeldShelf& s, const std::vector<uint32_t>& ids) {  // the same
        if (!valid_ids(ids.data(), int(ids.size()), s.shelf->experts())) throw std::out_of_range("no such expert");
        s.shelf->expect(ids.data(), int(ids.size()));
      })
      .def("foresee", [](HeldShelf& s, const std::string& when) {  // for benchmarks and tests
        if (when != "never" && when != "from disk" && when != "always") throw std::invalid_argument("never, from disk, or always");
        s.shelf->foresight().when(when == "never" ? Foresight::NEVER : when == "always" ? Foresight::ALWAYS : Foresight::FROM_DISK);
      })
      .def("take_guesses", [](HeldShelf& s) {
        const Foresight::Counts c = s.shelf->foresight().take_counts();
        return std::make_tuple(c.guessed, c.right, c.announced, c.used);
      })
      .def("take_counts", [](HeldShelf& s) {
        const Slots::Counts c = s.shelf->take_counts();
        return std::make_tuple(c.hits, c.misses, c.evictions, c.bytes, double(c.nanoseconds) / 1e9);
      });
  m.def("placeholder", [](const std::vector<int>& shape, bool position) {
    return placeholder(mx::Shape(shape.begin(), shape.end()), position ? mx::int32 : mx::uint32);
  });
  m.def("cached", &cached);
  m.def("placed", [](const array& ids, const HeldShelf& s) { return placed(ids, s.shelf); });
  nb::class_<HeldProgram>(m, "Program")
      .def("__init__", [](HeldProgram* self, const array& result, const array& token, const array& position, int caches) {
        new (self) HeldProgram{std::make_shared<Program>(result, token, position, caches)};
      })
      .def("jobs", [](const HeldProgram& p) { return p.program->jobs(); })
      .def("wait", [](const HeldProgram& p) { p.program->wait(); }, nb::call_guard<nb::gil_scoped_release>())
      .def("step", [](const HeldProgram& p, const array& token, const Arrays& caches, int position, int row) {
        return Program::step(p.program, token, caches, position, row);
      });
}
