// SPDX-License-Identifier: Apache-2.0
// The Python module vtclip._C. Importing it loads the library, whose static initialisers register
// the CPU kernels; tensors never pass through pybind11.
#undef TORCH_TARGET_VERSION  // under it torch's copy of pybind11 refuses; nothing here is torch's
#include <map>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu/common/capability.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of vtclip, registered with torch's dispatcher on import.";
  m.def(
      "build_info",
      [] {
        std::map<std::string, std::string> info{VTCLIP_BUILD_INFO};
        info["instructions"] = vtclip::cpu::capability_name();
        return info;
      },
      "What setup.py decided and why, and the instruction set taken on this machine.");
}
