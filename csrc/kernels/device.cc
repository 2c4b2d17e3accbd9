#include "kernels/device.h"

#include <cstdlib>
#include <cstring>

namespace fusedloss {
namespace {

bool Supported(CpuLevel level) {
  switch (level) {
    case CpuLevel::kBaseline:
      return true;
    case CpuLevel::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case CpuLevel::kAvx512:
      return Supported(CpuLevel::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
  }
  return false;
}

struct Choice {
  CpuLevel level = CpuLevel::kBaseline;
  const char* error = "";
};

constexpr CpuLevel kLevels[] = {CpuLevel::kBaseline, CpuLevel::kAvx2, CpuLevel::kAvx512};

Choice Choose() {
  Choice choice;
  for (CpuLevel level : kLevels) {
    if (Supported(level)) choice.level = level;
  }
  const char* forced = std::getenv("FUSEDLOSS_CPU");
  if (forced == nullptr || *forced == '\0') return choice;
  for (CpuLevel level : kLevels) {
    if (std::strcmp(forced, CpuLevelName(level)) != 0) continue;
    if (Supported(level)) {
      choice.level = level;
    } else {
      choice.error = "FUSEDLOSS_CPU names instructions that this CPU lacks; it is ignored";
    }
    return choice;
  }
  choice.error = "FUSEDLOSS_CPU must be baseline, avx2 or avx512; it is ignored";
  return choice;
}

const Choice& Chosen() {
  static const Choice choice = Choose();
  return choice;
}

}  // namespace

CpuLevel ChosenCpuLevel() { return Chosen().level; }
const char* CpuLevelError() { return Chosen().error; }

const char* CpuLevelName(CpuLevel level) {
  switch (level) {
    case CpuLevel::kAvx512:
      return "avx512";
    case CpuLevel::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace fusedloss
