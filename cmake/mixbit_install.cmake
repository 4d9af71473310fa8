# What `cmake --install build --component cpp` gives C++ programs: headers, libraries and the package that
# find_package(mixbit) reads. The component `python` is what the Python package needs.
include(CMakePackageConfigHelpers)
set(_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/mixbit")

set(_targets mixbit_common mixbit_kernels mixbit_assign mixbit_hw mixbit_storage mixbit_runtime)
if(MIXBIT_BUILD_OPS)
  list(APPEND _targets mixbit_ops)
endif()
foreach(target ${_targets})
  string(REPLACE "mixbit_" "" _short ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${_short})
endforeach()
install(TARGETS ${_targets} EXPORT mixbitTargets
        ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT cpp
        LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT cpp)
install(EXPORT mixbitTargets NAMESPACE mixbit:: DESTINATION "${_package_dir}" COMPONENT cpp)
foreach(room common kernels assign hw storage runtime ops)
  # The CUDA launchers are inside libmixbit_ops: their header would declare what nobody can link.
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/csrc/${room}/include/" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT cpp
          PATTERN "cuda.h" EXCLUDE)
endforeach()

configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/mixbitConfig.cmake.in" "${PROJECT_BINARY_DIR}/mixbitConfig.cmake"
                              INSTALL_DESTINATION "${_package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/mixbitConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/mixbitConfig.cmake" "${PROJECT_BINARY_DIR}/mixbitConfigVersion.cmake"
              "${CMAKE_CURRENT_LIST_DIR}/mixbit_torch.cmake" DESTINATION "${_package_dir}" COMPONENT cpp)
