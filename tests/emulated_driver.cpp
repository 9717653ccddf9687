// Runs the kernel on a call from stdin: which function, the call with a number of bytes in place of every pointer, then
// the bytes of each. Writes the status and all bytes back. Little-endian on both sides.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" {
int64_t backbones_scan_forward(const void* call);
int64_t backbones_scan_backward(const void* call);
int64_t backbones_scan_call_size();
}

static const int kPointers[] = {12, 13, 14, 15, 16, 32, 33, 34, 35, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46};

static void read(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(1);
}

int main() {
  int64_t backwards, status;
  read(&backwards, sizeof backwards);
  std::vector<int64_t> call(backbones_scan_call_size() / sizeof(int64_t));
  read(call.data(), call.size() * sizeof(int64_t));
  std::vector<std::vector<char>> memory;
  for (int field : kPointers) {
    memory.emplace_back(call[field]);
    read(memory.back().data(), memory.back().size());
    call[field] = memory.back().empty() ? 0 : (int64_t)memory.back().data();
  }
  status = (backwards ? backbones_scan_backward : backbones_scan_forward)(call.data());
  fwrite(&status, sizeof status, 1, stdout);
  for (const auto& bytes : memory) fwrite(bytes.data(), 1, bytes.size(), stdout);
  return 0;
}
