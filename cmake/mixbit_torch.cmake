# LibTorch as imported targets. find_package(Torch) is not used: with pip's CUDA build of torch it insists on a CUDA
# toolkit even when no CUDA source is compiled. The path comes from the interpreter, or from MIXBIT_TORCH_ROOT for a
# LibTorch without Python.
if(NOT MIXBIT_TORCH_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))"
    OUTPUT_VARIABLE MIXBIT_TORCH_ROOT
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE _torch_found
    ERROR_QUIET)
  if(NOT _torch_found EQUAL 0)
    message(FATAL_ERROR "mixbit: no torch in ${Python_EXECUTABLE}; install torch first (pip install torch) or pass "
                        "-DMIXBIT_TORCH_ROOT=/path/to/libtorch")
  endif()
endif()
foreach(lib torch torch_cpu c10)
  add_library(mixbit_torch_${lib} SHARED IMPORTED)
  set_target_properties(mixbit_torch_${lib} PROPERTIES IMPORTED_LOCATION "${MIXBIT_TORCH_ROOT}/lib/lib${lib}.so")
endforeach()
add_library(mixbit_torch INTERFACE)
target_include_directories(mixbit_torch SYSTEM INTERFACE "${MIXBIT_TORCH_ROOT}/include"
                                                         "${MIXBIT_TORCH_ROOT}/include/torch/csrc/api/include")
target_link_libraries(mixbit_torch INTERFACE mixbit_torch_torch mixbit_torch_torch_cpu mixbit_torch_c10)
# Where the linker finds what these libraries need themselves.
target_link_options(mixbit_torch INTERFACE "LINKER:-rpath-link,${MIXBIT_TORCH_ROOT}/lib")

file(STRINGS "${MIXBIT_TORCH_ROOT}/include/torch/headeronly/version.h" _torch_version_lines
     REGEX "#define TORCH_VERSION_(MAJOR|MINOR) ")
if(NOT _torch_version_lines)
  file(STRINGS "${MIXBIT_TORCH_ROOT}/include/torch/csrc/api/include/torch/version.h" _torch_version_lines
       REGEX "#define TORCH_VERSION_(MAJOR|MINOR) ")
endif()
string(REGEX REPLACE ".*TORCH_VERSION_MAJOR ([0-9]+).*" "\\1" MIXBIT_TORCH_MAJOR "${_torch_version_lines}")
string(REGEX REPLACE ".*TORCH_VERSION_MINOR ([0-9]+).*" "\\1" MIXBIT_TORCH_MINOR "${_torch_version_lines}")
message(STATUS "mixbit: torch ${MIXBIT_TORCH_MAJOR}.${MIXBIT_TORCH_MINOR} in ${MIXBIT_TORCH_ROOT}")
