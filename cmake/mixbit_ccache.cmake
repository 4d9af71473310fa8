# Use ccache where it is installed; harmless where it is not.
find_program(MIXBIT_CCACHE ccache)
if(MIXBIT_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${MIXBIT_CCACHE}")
endif()
