#ifndef MIXBIT_RUNTIME_C_H_
#define MIXBIT_RUNTIME_C_H_

/* The integer runtime for C. Functions that can fail return NULL or -1 and write one sentence to `error`, of at most
 * `error_size` bytes with the final 0; error may be NULL where error_size is 0. Sizes are those of one input or output,
 * without the batch. */

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mixbit_network mixbit_network;

/* Opens an integer package. The file must not change until mixbit_close. */
mixbit_network* mixbit_open(const char* path, int threads, char* error, size_t error_size);
void mixbit_close(mixbit_network* network);

int mixbit_outputs(const mixbit_network* network);
/* Number of sizes of the input (output < 0) or of an output; -1 where there is no such output. */
int mixbit_rank(const mixbit_network* network, int output);
/* Size `axis` of the input (output < 0) or of an output; -1 where there is none. */
int64_t mixbit_size(const mixbit_network* network, int output, int axis);
/* Name of an output; NULL where there is none. Lives as long as the network. */
const char* mixbit_output_name(const mixbit_network* network, int output);
/* Instruction set of the kernels: scalar, avx2, avx512, vnni or amx. */
const char* mixbit_isa(const mixbit_network* network);

/* x: float32 [batch, sizes of the input]; outputs[i]: room for float32 [batch, sizes of output i]. Calls from several
 * threads wait for each other. Returns 0, or -1. */
int mixbit_run(mixbit_network* network, const float* x, int64_t batch, float* const* outputs, char* error,
               size_t error_size);

#ifdef __cplusplus
}
#endif

#endif /* MIXBIT_RUNTIME_C_H_ */
