// lctx_kernels._ring: the communicators of ring attention, for Python. Addresses and streams come
// as integers, so that nothing of torch is needed here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "copy_ring.h"
#include "nccl_ring.h"

namespace py = pybind11;

namespace lctx::ring {
namespace {

// What https://dmlc.github.io/dlpack defines: how a tensor on foreign memory is handed over.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
  int64_t size;  // not part of the format: `tensor.shape` points here
};
constexpr int32_t kDlCuda = 2;
constexpr uint8_t kDlUnsigned = 1;

// A capsule for torch.from_dlpack: (bytes,) uint8 at `address`, which nobody frees.
py::capsule as_capsule(uint64_t address, int64_t bytes, int device) {
  auto* managed = new DlManagedTensor{};
  managed->size = bytes;
  managed->tensor = {reinterpret_cast<void*>(address),
                     kDlCuda,
                     device,
                     1,
                     kDlUnsigned,
                     8,
                     1,
                     &managed->size,
                     nullptr,
                     0};
  managed->deleter = [](DlManagedTensor* self) { delete self; };
  return py::capsule(managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // taken over
    auto* unused = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    unused->deleter(unused);
  });
}

// Whole numbers of a tuple, read without the generic casters: they are a tenth of a hop's time.
template <size_t kCount>
std::array<int64_t, kCount> numbers(py::handle item) {
  if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != kCount) {
    throw py::type_error("expected tuples of " + std::to_string(kCount) + " integers");
  }
  std::array<int64_t, kCount> found;
  for (size_t i = 0; i < kCount; ++i) {
    found[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(item.ptr(), static_cast<Py_ssize_t>(i)));
    if (found[i] == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  return found;
}

// Tuples of peer, address, bytes and place.
std::vector<Message> messages(const py::list& given) {
  std::vector<Message> found;
  found.reserve(given.size());
  for (const py::handle item : given) {
    const auto [peer, data, bytes, place] = numbers<4>(item);
    if (bytes > 0) {
      found.push_back({static_cast<int>(peer), static_cast<CUdeviceptr>(data), bytes, place, {}});
    }
  }
  return found;
}

CUstream stream_of(uint64_t stream) { return reinterpret_cast<CUstream>(stream); }

int64_t post(Ring& ring, uint64_t stream, int64_t call, int phase, int step, int part,
             const py::list& sends, const py::list& recvs, const py::list& pieces, double timeout) {
  Hop hop;
  hop.call = call;
  hop.phase = phase;
  hop.step = step;
  hop.part = part;
  hop.sends = messages(sends);
  hop.recvs = messages(recvs);
  if (!pieces.empty()) {
    std::vector<std::pair<CUdeviceptr, int64_t>> all;
    int64_t total = 0;
    for (const py::handle item : pieces) {
      const auto [data, bytes] = numbers<2>(item);
      all.emplace_back(static_cast<CUdeviceptr>(data), bytes);
      total += bytes;
    }
    if (hop.sends.size() != 1 || hop.sends[0].bytes != total) {
      throw std::runtime_error("the pieces are not those of the only message");
    }
    hop.sends[0].pieces = std::move(all);
  }
  hop.timeout = timeout;
  const py::gil_scoped_release release;
  return ring.post(stream_of(stream), std::move(hop));
}

py::dict as_dict(const Hop& hop) {
  py::list to, from;
  int64_t sent = 0, received = 0;
  for (const Message& m : hop.sends) {
    to.append(m.peer);
    sent += m.bytes;
  }
  for (const Message& m : hop.recvs) {
    from.append(m.peer);
    received += m.bytes;
  }
  const auto time = [](double t) -> py::object { return t == 0 ? py::none() : py::cast(t); };
  py::dict entry;
  entry["call"] = hop.call;
  entry["phase"] = hop.phase;
  entry["step"] = hop.step;
  entry["part"] = hop.part;
  entry["to"] = to;
  entry["from"] = from;
  entry["bytes_sent"] = sent;
  entry["bytes_received"] = received;
  entry["posted"] = hop.posted;
  entry["ready"] = time(hop.ready);
  entry["done"] = time(hop.done);
  entry["error"] = hop.error.empty() ? py::object(py::none()) : py::cast(hop.error);
  return entry;
}

std::vector<py::bytes> as_bytes(const std::vector<std::string>& given) {
  return {given.begin(), given.end()};
}

}  // namespace
}  // namespace lctx::ring

PYBIND11_MODULE(_ring, m) {
  using namespace lctx::ring;
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("as_capsule", &as_capsule, py::arg("address"), py::arg("bytes"), py::arg("device"));
  m.def("open_nccl", [](const std::string& library) {
    int version = 0;
    nccl::check(nccl::api(library).ncclGetVersion(&version), "ncclGetVersion");
    return version;
  });
  m.def("open_driver", [] { driver(); });

  py::class_<Ring>(m, "Ring")
      .def("post", &post)
      .def(
          "wait", [](Ring& ring, int64_t n, uint64_t stream) { ring.wait(n, stream_of(stream)); },
          release())
      .def(
          "settle", [](Ring& ring, uint64_t stream) { ring.settle(stream_of(stream)); }, release())
      .def("done", &Ring::done, release())
      .def("synchronize", &Ring::synchronize, release())
      .def("abort", &Ring::abort, release())
      .def("let_go", &Ring::let_go, release())
      .def("free_memory", &Ring::free_memory, release())
      .def("close", &Ring::close, py::arg("patience") = 1.0, release())
      .def_property_readonly("library_seconds", &Ring::library_seconds)
      .def_property_readonly("failed", &Ring::failed)
      .def("failure",
           [](Ring& ring) {
             const Hop hop = ring.failure();
             py::dict entry = as_dict(hop);
             entry["number"] = hop.number;  // 0: no hop failed, the ring did
             return entry;
           })
      .def("log", [](Ring& ring) {
        py::list entries;
        for (const Hop& hop : ring.log()) entries.append(as_dict(hop));
        return entries;
      });

  py::class_<CopyRing, Ring>(m, "CopyRing")
      .def(py::init<int, int>(), py::arg("rank"), py::arg("world_size"))
      .def("words_handle", [](const CopyRing& r) { return py::bytes(r.words_handle()); })
      .def("connect_words", &CopyRing::connect_words, release())
      .def("allocate", [](CopyRing& r, int64_t n) { return py::bytes(r.allocate(n)); })
      .def("try_direct", &CopyRing::try_direct, release())
      .def("check_direct", &CopyRing::check_direct, release())
      .def("use_direct", &CopyRing::use_direct)
      .def("connect", &CopyRing::connect, release())
      .def("disconnect", &CopyRing::disconnect, release())
      .def_property_readonly("memory", &CopyRing::memory);

  py::class_<NcclRing, Ring>(m, "NcclRing")
      .def(py::init<int, int, const std::vector<std::string>&, int>(), py::arg("rank"),
           py::arg("world_size"), py::arg("ids"), py::arg("max_ctas"), release())
      .def_static("make_ids", [] { return as_bytes(NcclRing::make_ids()); })
      .def("allocate", &NcclRing::allocate, release())
      .def("deregister", &NcclRing::deregister, release())
      .def("warm_up", &NcclRing::warm_up, release())
      .def_property_readonly("memory", &NcclRing::memory);
}
