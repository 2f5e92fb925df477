// Choice of the instruction set at run time. This file is compiled without special flags: it runs on every processor.
#include <cstring>
#include <string>

#include "kernels.h"

#ifdef ATTNSPAN_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace attnspan {

extern const Kernels kernels_portable;
#ifdef ATTNSPAN_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_amx;

namespace {

// AMX needs the processor's word and, for each process, the kernel's permission to use the large tile state.
bool amx_allowed() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return false;
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif
#ifdef ATTNSPAN_EMULATE_BF16
extern const Kernels kernels_emulated;
#endif

const Kernels* select_kernels(const char* wanted, const char** names) {
  struct Entry {
    const Kernels* table;
    bool runs;
  };
#ifdef ATTNSPAN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // Cooper Lake has the bf16 products without the bit counts; it runs the avx512 kernels.
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vpopcntdq");
  static const bool amx = bf16 && amx_allowed();
#endif
  const Entry entries[] = {
#ifdef ATTNSPAN_X86
      {&kernels_amx, amx}, {&kernels_avx512bf16, bf16}, {&kernels_avx512, avx512}, {&kernels_avx2, avx2},
#endif
      {&kernels_portable, true},
#ifdef ATTNSPAN_EMULATE_BF16
      {&kernels_emulated, true},  // the matrix-unit code with plain loops for its product: for tests
#endif
  };
  static thread_local std::string available;
  available.clear();
  const Kernels* found = nullptr;
  for (const Entry& e : entries) {
    if (!e.runs) continue;
    available += (available.empty() ? "" : " ") + std::string(e.table->name);
    if (!found && (!wanted || !*wanted || !std::strcmp(wanted, e.table->name))) found = e.table;
  }
  if (names) *names = available.c_str();
  return found;
}

}  // namespace attnspan
