// Runs a package that `mixbit.export.package` has compiled: no Python, and no mixbit either, since its integer network
// consists of ops of torch.
//
// Usage: run_package PACKAGE.pt2 INPUT.npy OUTPUT.npy...
//   INPUT.npy: float32 [N, ...], as numpy.save writes it. One OUTPUT.npy (float32) for each output of the network, in
//   the order of `mixbit.export.reference`.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The array of a .npy file: a magic word, the length of a Python literal, the literal, the data.
at::Tensor read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  char magic[8];
  if (!file.read(magic, 8) || std::string(magic, 6) != "\x93NUMPY") throw std::runtime_error(path + " is no .npy file");
  uint32_t length = 0;  // two bytes in version 1, four since
  file.read(reinterpret_cast<char*>(&length), magic[6] == 1 ? 2 : 4);
  if (!file || length > (1U << 20)) throw std::runtime_error(path + " is damaged");
  std::string header(length, ' ');
  file.read(header.data(), length);
  if (header.find("'<f4'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos) {
    throw std::runtime_error(path + " has the header " + header + "; expected float32 ('<f4') in C order");
  }
  std::vector<int64_t> sizes;
  size_t at = header.find('(') + 1;
  while (at < header.size() && header[at] != ')') {
    size_t used = 0;
    sizes.push_back(std::stoll(header.substr(at), &used));
    at = header.find_first_not_of(", ", at + used);
  }
  const auto array = at::empty(sizes, at::kFloat);
  const auto bytes = static_cast<std::streamsize>(array.nbytes());
  file.read(static_cast<char*>(array.mutable_data_ptr()), bytes);
  if (file.gcount() != bytes) throw std::runtime_error(path + " is truncated");
  return array;
}

void write_npy(const std::string& path, const at::Tensor& tensor) {
  const auto array = tensor.to(at::kCPU, at::kFloat).contiguous();
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (const auto size : array.sizes()) header += std::to_string(size) + ",";
  header += "), }";
  while ((header.size() + 11) % 64 != 0) header += ' ';  // the data starts at a multiple of 64 bytes
  header += '\n';
  const auto length = static_cast<uint16_t>(header.size());
  std::ofstream file(path, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8);
  file.write(reinterpret_cast<const char*>(&length), 2);
  file << header;
  file.write(static_cast<const char*>(array.const_data_ptr()), static_cast<std::streamsize>(array.nbytes()));
  if (!file) throw std::runtime_error("cannot write " + path);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) throw std::runtime_error("usage: run_package PACKAGE.pt2 INPUT.npy OUTPUT.npy...");
  const std::vector<std::string> paths(argv + 3, argv + argc);
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  const auto outputs = package.run({read_npy(argv[2])});
  if (outputs.size() != paths.size()) {
    throw std::runtime_error("the network has " + std::to_string(outputs.size()) + " outputs; got " +
                             std::to_string(paths.size()) + " files to write");
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    write_npy(paths[i], outputs[i]);
    std::printf("%s: %lld values\n", paths[i].c_str(), static_cast<long long>(outputs[i].numel()));
  }
  return 0;
} catch (const c10::Error& error) {
  std::cerr << "run_package: " << error.what_without_backtrace() << '\n';
  return 2;
} catch (const std::exception& error) {
  std::cerr << "run_package: " << error.what() << '\n';
  return 2;
}
