// Quantization-aware training in C++: a small CIFAR-10 network whose convolutions and classifier have learned step
// sizes (LSQ), trained on real images with plain LibTorch. Bits are tensors, as scales are: a search may move them
// between two steps.
//
// Usage: qat IMAGES [--bits 4] [--epochs 30] [--batch 32] [--rate 0.05]
//   IMAGES: records of 1 label byte and 3072 bytes (3 x 32 x 32), the binary format of CIFAR-10; for example what
//   `python scripts/cifar_binary.py` writes from the images that are shipped.

#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <mixbit/ops/ops.h>

namespace {

// A learned scale with LSQ's gradient factor, and its bits.
struct StepImpl : torch::nn::Module {
  torch::Tensor scale, floor, bits, zero_point;
  bool is_signed, narrow_range, batched;

  StepImpl(int64_t channels, double bit_width, bool is_signed_, bool narrow_range_, bool batched_)
      : is_signed(is_signed_), narrow_range(narrow_range_), batched(batched_) {
    scale = register_parameter("scale", torch::ones({channels}));
    floor = register_buffer("floor", torch::zeros({channels}));
    bits = register_buffer("bits", torch::full({1}, bit_width));
    zero_point = register_buffer("zero_point", torch::zeros({1}));
  }

  torch::Tensor largest_code() const { return (torch::exp2(is_signed ? bits - 1 : bits) - 1).clamp_min(1); }

  // The scale of least squared error for what is to be quantized.
  void calibrate(const torch::Tensor& x) {
    torch::NoGradGuard no_grad;
    const bool per_channel = scale.numel() > 1;
    scale.copy_(
        mixbit::mse_scales(x, bits, is_signed, narrow_range, per_channel ? std::optional<int64_t>(0) : std::nullopt)
            .reshape({-1}));
    floor.copy_(scale * std::ldexp(1.0, -20));
  }

  // The scale's value, kept off zero, and its gradient times 1 / sqrt(n hi).
  torch::Tensor forward(const torch::Tensor& x) {
    const double count =
        static_cast<double>(x.numel()) / static_cast<double>(scale.numel() * (batched ? x.size(0) : 1));
    const auto factor = torch::rsqrt(largest_code() * count);
    return value() + (scale - scale.detach()) * factor;
  }

  torch::Tensor value() const { return torch::maximum(scale.detach(), floor); }
};
TORCH_MODULE(Step);

// A convolution with quantized weights (per output channel) and inputs (per tensor).
struct QuantizedConvImpl : torch::nn::Module {
  torch::nn::Conv2d conv{nullptr};
  Step act{nullptr}, weight{nullptr};
  bool calibrating = false;

  QuantizedConvImpl(torch::nn::Conv2dOptions options, double bit_width, bool signed_input) {
    const int64_t channels = options.out_channels();
    conv = register_module("conv", torch::nn::Conv2d(options));
    act = register_module("act", Step(1, bit_width, signed_input, false, true));
    weight = register_module("weight", Step(channels, bit_width, true, true, false));
  }

  torch::Tensor forward(const torch::Tensor& x) {
    if (calibrating) {
      act->calibrate(x);
      weight->calibrate(conv->weight);
      return conv->forward(x);
    }
    const auto& o = conv->options;
    return mixbit::quantized_conv2d(x, conv->weight, conv->bias.defined() ? std::optional(conv->bias) : std::nullopt,
                                    act->forward(x), act->zero_point, act->bits, weight->forward(conv->weight),
                                    weight->bits, act->is_signed, true, 0, *o.stride(),
                                    std::get<torch::ExpandingArray<2>>(o.padding()), *o.dilation(), o.groups());
  }
};
TORCH_MODULE(QuantizedConv);

struct NetworkImpl : torch::nn::Module {
  QuantizedConv stem{nullptr}, middle{nullptr}, last{nullptr}, head{nullptr};
  torch::nn::BatchNorm2d norm1{nullptr}, norm2{nullptr}, norm3{nullptr};

  explicit NetworkImpl(double bit_width) {
    const auto conv = [](int64_t in, int64_t out, int64_t kernel, int64_t stride) {
      return torch::nn::Conv2dOptions(in, out, kernel).stride(stride).padding(kernel / 2).bias(kernel == 1);
    };
    stem = register_module("stem", QuantizedConv(conv(3, 16, 3, 1), 8.0, true));
    norm1 = register_module("norm1", torch::nn::BatchNorm2d(16));
    middle = register_module("middle", QuantizedConv(conv(16, 32, 3, 2), bit_width, false));
    norm2 = register_module("norm2", torch::nn::BatchNorm2d(32));
    last = register_module("last", QuantizedConv(conv(32, 64, 3, 2), bit_width, false));
    norm3 = register_module("norm3", torch::nn::BatchNorm2d(64));
    head = register_module("head", QuantizedConv(conv(64, 10, 1, 1), bit_width, false));
  }

  torch::Tensor forward(torch::Tensor x) {
    x = torch::relu(norm1->forward(stem->forward(x)));
    x = torch::relu(norm2->forward(middle->forward(x)));
    x = torch::relu(norm3->forward(last->forward(x)));
    return head->forward(torch::adaptive_avg_pool2d(x, {1, 1})).flatten(1);
  }

  // One pass in which every step takes the scale of least error.
  void calibrate(const torch::Tensor& images) {
    torch::NoGradGuard no_grad;
    for (auto& module : modules()) {
      if (auto* layer = module->as<QuantizedConvImpl>()) layer->calibrating = true;
    }
    forward(images);
    for (auto& module : modules()) {
      if (auto* layer = module->as<QuantizedConvImpl>()) layer->calibrating = false;
    }
  }
};
TORCH_MODULE(Network);

// Signal-to-noise ratio of all weights at their bits, in dB: one call for the whole model.
double weight_sqnr(Network& model) {
  torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> weights, scales, bits;
  for (auto& module : model->modules()) {
    if (auto* layer = module->as<QuantizedConvImpl>()) {
      weights.push_back(layer->conv->weight);
      scales.push_back(layer->weight->value().unsqueeze(0));
      bits.push_back(layer->weight->bits);
    }
  }
  const auto [signals, noises] = mixbit::quantization_noise_foreach(weights, scales, bits, true, true, 0);
  double signal = 0, noise = 0;
  for (size_t i = 0; i < signals.size(); ++i) {
    signal += signals[i].sum().item<double>();
    noise += noises[i].sum().item<double>();
  }
  return 10 * std::log10(signal / noise);
}

struct Data {
  torch::Tensor images, labels;
};

Data read(const std::string& path) {
  constexpr int64_t kPixels = 3 * 32 * 32;
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (bytes.empty() || bytes.size() % (kPixels + 1) != 0) {
    throw std::runtime_error(path + " has " + std::to_string(bytes.size()) + " bytes; expected a multiple of 3073");
  }
  const auto records =
      torch::from_blob(bytes.data(), {static_cast<int64_t>(bytes.size()) / (kPixels + 1), kPixels + 1}, torch::kByte);
  const auto mean = torch::tensor({0.4914, 0.4822, 0.4465}).reshape({1, 3, 1, 1});
  const auto deviation = torch::tensor({0.2470, 0.2435, 0.2616}).reshape({1, 3, 1, 1});
  const auto pixels = records.slice(1, 1).reshape({-1, 3, 32, 32}).to(torch::kFloat) / 255;
  return {((pixels - mean) / deviation).contiguous(), records.select(1, 0).to(torch::kLong)};
}

double accuracy(Network& model, const Data& data) {
  torch::NoGradGuard no_grad;
  model->eval();
  const auto correct = model->forward(data.images).argmax(1).eq(data.labels).to(torch::kFloat).mean();
  model->train();
  return 100 * correct.item<double>();
}

}  // namespace

int main(int argc, char** argv) try {
  std::map<std::string, double> options = {{"--bits", 4}, {"--epochs", 30}, {"--batch", 32}, {"--rate", 0.05}};
  if (argc < 2 || argc % 2 != 0)
    throw std::runtime_error("usage: qat IMAGES [--bits B] [--epochs E] [--batch N] [--rate R]");
  for (int i = 2; i + 1 < argc; i += 2) {
    if (!options.count(argv[i])) throw std::runtime_error(std::string("unknown option ") + argv[i]);
    options[argv[i]] = std::stod(argv[i + 1]);
  }
  torch::manual_seed(0);
  const Data data = read(argv[1]);
  const auto batch = static_cast<int64_t>(options["--batch"]);
  Network model(options["--bits"]);
  model->calibrate(data.images.slice(0, 0, 2 * batch));
  // Scales are smaller than weights: they take smaller steps.
  std::vector<torch::Tensor> scales, others;
  for (const auto& item : model->named_parameters()) {
    (item.key().ends_with("scale") ? scales : others).push_back(item.value());
  }
  const auto rate = [&](double share) {
    return std::make_unique<torch::optim::SGDOptions>(
        torch::optim::SGDOptions(share * options["--rate"]).momentum(0.9));
  };
  torch::optim::SGD optimizer(std::vector<torch::optim::OptimizerParamGroup>{{others, rate(1)}, {scales, rate(0.001)}},
                              torch::optim::SGDOptions(options["--rate"]));
  std::printf("%lld images, weights %.1f dB above their quantization noise\n",
              static_cast<long long>(data.images.size(0)), weight_sqnr(model));
  for (int epoch = 1; epoch <= static_cast<int>(options["--epochs"]); ++epoch) {
    const auto order = torch::randperm(data.images.size(0));
    double total = 0;
    for (int64_t first = 0; first < data.images.size(0); first += batch) {
      const auto picked = order.slice(0, first, first + batch);
      optimizer.zero_grad();
      const auto loss = torch::nn::functional::cross_entropy(model->forward(data.images.index({picked})),
                                                             data.labels.index({picked}));
      loss.backward();
      optimizer.step();
      total += loss.item<double>() * static_cast<double>(picked.size(0));
    }
    std::printf("epoch %d loss %.4f\n", epoch, total / static_cast<double>(data.images.size(0)));
  }
  std::printf("accuracy %.1f %% on the training images, weights %.1f dB\n", accuracy(model, data), weight_sqnr(model));
  return 0;
} catch (const c10::Error& error) {
  std::cerr << "qat: " << error.what_without_backtrace() << '\n';
  return 2;
} catch (const std::exception& error) {
  std::cerr << "qat: " << error.what() << '\n';
  return 2;
}
