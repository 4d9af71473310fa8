# mixbit_target_defaults(<target>): warnings and code generation common to all rooms.
function(mixbit_target_defaults target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wno-unknown-pragmas
                                           $<$<BOOL:${MIXBIT_WERROR}>:-Werror>)
  # A fused multiply-add rounds once where the formula rounds twice: it would make instruction sets disagree.
  target_compile_options(${target} PRIVATE -ffp-contract=off)
endfunction()
