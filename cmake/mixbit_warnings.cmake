# mixbit_target_defaults(<target>): warnings and code generation common to all rooms.
function(mixbit_target_defaults target)
  # A fused multiply-add rounds once where the formula rounds twice: it would make instruction sets disagree.
  target_compile_options(
    ${target}
    PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wno-unknown-pragmas;-ffp-contract=off>"
            "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${MIXBIT_WERROR}>>:-Werror>"
            "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;-Xcompiler=-ffp-contract=off,-Wall>"
            "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${MIXBIT_WERROR}>>:-Werror=all-warnings>")
endfunction()
