#pragma once

// NumPy's files of float32 arrays. What is read may come from a stranger.

#include <string>
#include <vector>

#include <mixbit/runtime/package.h>

namespace mixbit::runtime {

struct FloatArray {
  Shape shape;
  std::vector<float> data;  // row by row
};

// Throws Error where the file is missing, damaged or no float32 array in C order.
FloatArray read_npy(const std::string& path);

// Beside the file first, then renamed.
void write_npy(const std::string& path, const Shape& shape, const float* data);

// Writes a whole file, beside it first, then renamed.
void write_file(const std::string& path, const std::string& text);

}  // namespace mixbit::runtime
