# Finds the interpreter once; a build of the C++ rooms alone (no ops, no module) needs none.
if(MIXBIT_BUILD_OPS OR MIXBIT_BUILD_PYTHON)
  if(MIXBIT_BUILD_PYTHON)
    find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
  else()
    find_package(Python REQUIRED COMPONENTS Interpreter)
  endif()
endif()
