# MIXBIT_CUDA=AUTO|ON|OFF. OFF looks for nothing, so it works on a machine without a toolkit although pip's torch is a
# CUDA build. AUTO builds the CUDA kernels where both a toolkit and a CUDA build of torch are found.
set(MIXBIT_HAS_CUDA OFF)
if(MIXBIT_CUDA STREQUAL "OFF" OR NOT MIXBIT_BUILD_OPS)
  return()
endif()
if(NOT MIXBIT_CUDA MATCHES "^(AUTO|ON)$")
  message(FATAL_ERROR "mixbit: MIXBIT_CUDA=${MIXBIT_CUDA}; expected AUTO, ON or OFF")
endif()
find_package(CUDAToolkit QUIET)
if(CUDAToolkit_FOUND AND CUDAToolkit_NVCC_EXECUTABLE AND EXISTS "${MIXBIT_TORCH_ROOT}/lib/libtorch_cuda.so")
  # Not torch's own list: it names architectures that the newest toolkits have dropped.
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "80;90")
  endif()
  set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}" CACHE FILEPATH "CUDA compiler")
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  set(MIXBIT_HAS_CUDA ON)
elseif(MIXBIT_CUDA STREQUAL "ON")
  message(FATAL_ERROR "mixbit: MIXBIT_CUDA=ON, but no CUDA toolkit with nvcc was found, or torch in "
                      "${MIXBIT_TORCH_ROOT} is a CPU build; install them or use -DMIXBIT_CUDA=OFF")
endif()
message(STATUS "mixbit: CUDA kernels ${MIXBIT_HAS_CUDA} (MIXBIT_CUDA=${MIXBIT_CUDA})")
