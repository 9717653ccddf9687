// Runs recorded programs: launches of compiled kernels, and PyTorch's operators, behind one another, in memory that the
// caller holds. PyTorch is known by the C functions of its stable interface, a GPU by those of its driver; the caller
// finds them. A program is a row of words, written by backbones/ops/program.py.
#include <cstring>

#include "parallel.h"

namespace scan {
namespace {

using Word = uint64_t;  // also an argument of PyTorch's dispatcher
using Handle = void*;   // of a tensor or list of PyTorch's

struct Host {  // the fields of `Host` in backbones/ops/native.py
  int32_t (*tensor)(void* data, int64_t rank, const Word* sizes, const Word* strides, int64_t offset, int32_t dtype,
                    int32_t device, int32_t index, Handle* made);
  int32_t (*free)(Handle tensor);
  int32_t (*call)(const char* name, const char* overload, Word* arguments, Word version);
  int32_t (*list)(size_t size, Handle* made);
  int32_t (*append)(Handle list, Word value);
  int32_t (*launch)(Handle kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads, unsigned threads_y,
                    unsigned threads_z, unsigned shared, Handle stream, void** parameters, void** extra);
  int32_t (*context)(Handle* current);
  Word version;
  int64_t device, index;
};

enum Instruction : Word { kEnd = 0, kLaunch = 1, kProduct = 2, kScaledProduct = 3, kOperator = 4, kGelu = 5 };
enum Argument : Word { kValue = 0, kTensor = 1, kOptional = 2, kList = 3 };
enum Result : int64_t { kDone = -1, kNoContext = -2 };  // or where the instruction stands that failed

constexpr int kMost = 64;  // parameters of a launch, arguments of an operator; the writer sees to it

struct Run {
  const Host& host;
  const Word* addresses;
  Handle stream;
  const Word* at;

  Word next() { return *at++; }

  void* address() {  // the number of an address, and how many bytes behind it
    const Word base = addresses[next()];
    return (void*)(base + next());
  }

  bool tensor(Handle* made) {  // an address, a dtype, the rank, sizes, strides
    void* data = address();
    const int32_t dtype = (int32_t)next();
    const int64_t rank = (int64_t)next();
    const Word* sizes = at;
    at += 2 * rank;
    return !host.tensor(data, rank, sizes, sizes + rank, 0, dtype, (int32_t)host.device, (int32_t)host.index, made);
  }

  const char* text() {  // its length, and its characters with a zero behind them
    const Word size = next();
    const char* from = (const char*)at;
    at += size / sizeof(Word) + 1;
    return from;
  }

  bool argument(Word* value) {
    Handle made = nullptr;
    switch (next()) {
      case kTensor:
        if (!tensor(&made)) return false;
        break;
      case kOptional: {  // PyTorch frees it
        Word inner;
        if (!argument(&inner)) return false;
        made = new Word(inner);
        break;
      }
      case kList: {
        Word count = next();
        if (host.list(count, &made)) return false;
        for (Word item; count; count--)
          if (!argument(&item) || host.append(made, item)) return false;
        break;
      }
      default:
        *value = next();
        return true;
    }
    *value = (Word)made;
    return true;
  }

  bool launch() {  // the kernel, grid, threads, shared memory, the number of parameters and those
    const Handle kernel = (Handle)next();
    const unsigned x = (unsigned)next(), y = (unsigned)next(), z = (unsigned)next();
    const unsigned threads = (unsigned)next(), shared = (unsigned)next(), count = (unsigned)next();
    Word values[kMost];
    void* parameters[kMost];
    for (unsigned i = 0; i < count; i++) {
      values[i] = next() == kTensor ? (Word)address() : next();
      parameters[i] = &values[i];
    }
    return !host.launch(kernel, x, y, z, threads, 1, 1, shared, stream, parameters, nullptr);
  }

  struct Tensors {
    const Host& host;
    int count = 0;
    Handle all[4] = {};
    explicit Tensors(const Host& host) : host(host) {}
    ~Tensors() {
      while (count) host.free(all[--count]);
    }
  };

  bool product(bool scaled) {  // PyTorch's function, where the result goes, two or three tensors, and factors of the sum
    const Word function = next();
    Tensors given(host);
    for (int count = scaled ? 4 : 3; given.count < count; given.count++)
      if (!tensor(&given.all[given.count])) return false;
    Handle* const x = given.all;
    if (!scaled) return !((int32_t (*)(Handle, Handle, Handle))function)(x[0], x[1], x[2]);
    double factors[2];
    std::memcpy(factors, at, sizeof factors);
    at += 2;
    return !((int32_t (*)(Handle, Handle, Handle, Handle, double, double))function)(x[0], x[1], x[2], x[3], factors[0],
                                                                                   factors[1]);
  }

  struct Text {  // as C++ passes a std::string_view
    size_t size;
    const char* from;
  };

  bool gelu() {  // PyTorch's function, one or two tensors, and where the result goes
    const Word function = next();
    const int count = (int)next();
    Tensors given(host);
    for (; given.count <= count; given.count++)
      if (!tensor(&given.all[given.count])) return false;
    Handle* const x = given.all;
    const Text exact{4, "none"};
    if (count == 1)
      ((Handle(*)(Handle, Text, Handle))function)(x[0], exact, x[1]);
    else
      ((Handle(*)(Handle, Handle, Text, Handle))function)(x[0], x[1], exact, x[2]);
    return true;
  }

  bool operation() {  // names of the operator and its overload, the numbers of its arguments and results, and arguments
    const char* name = text();
    const char* overload = text();
    const Word count = next(), results = next();
    Word stack[kMost];
    for (Word i = 0; i < count; i++)
      if (!argument(&stack[i])) return false;
    if (host.call(name, overload, stack, host.version)) return false;
    for (Word i = 0; i < results; i++) host.free((Handle)stack[i]);  // the tensors that it wrote to, once more
    return true;
  }

  bool instruction(Word kind) {
    switch (kind) {
      case kLaunch:
        return launch();
      case kOperator:
        return operation();
      case kGelu:
        return gelu();
      default:
        return product(kind == kScaledProduct);
    }
  }
};

}  // namespace
}  // namespace scan

// `addresses` are what the program numbers. Returns `Result`.
SCAN_EXPORT int64_t backbones_program_run(const scan::Host* host, const scan::Word* program, const scan::Word* addresses,
                                          void* stream) {
  scan::Handle current = nullptr;
  if (host->context && (host->context(&current) || !current)) return scan::kNoContext;
  scan::Run run{*host, addresses, stream, program};
  for (;;) {
    const scan::Word* begin = run.at;
    const scan::Word kind = run.next();
    if (kind == scan::kEnd) return scan::kDone;
    try {
      if (!run.instruction(kind)) return begin - program;
    } catch (...) {  // no exception may reach Python
      return begin - program;
    }
  }
}

SCAN_EXPORT int64_t backbones_program_host_size() { return sizeof(scan::Host); }
