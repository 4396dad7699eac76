// A compiled model in C++: errors are exceptions, and what was opened closes itself.
//
//     pumice::Model model("./model.so");
//     pumice::Instance instance(model, /*threads=*/2);
//     std::vector<std::vector<std::byte>> outputs = instance.run({image});
//
// Several models may be open at once, and several instances of each, one for each thread that calls.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pumice.h"

namespace pumice {

class Error : public std::runtime_error {
  public:
    Error(pumice_status status, const std::string &what) : std::runtime_error(what), status(status) {}
    const pumice_status status;
};

// A library in memory, with its functions.
class Model {
  public:
    explicit Model(const std::string &path) : library_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL), &dlclose) {
        if (!library_) throw Error(PUMICE_BAD_ARGUMENT, dlerror());
        find(abi, "pumice_abi");
        find(manifest, "pumice_manifest");
        find(input_count, "pumice_input_count");
        find(output_count, "pumice_output_count");
        find(input, "pumice_input");
        find(output, "pumice_output");
        find(open, "pumice_open");
        find(run, "pumice_run");
        find(verify, "pumice_verify");
        find(error, "pumice_error");
        find(close, "pumice_close");
        if (abi() != PUMICE_ABI) throw Error(PUMICE_BAD_ARGUMENT, path + ": has another version of the C interface");
    }

    std::vector<pumice_tensor> inputs() const { return tensors(input_count, input); }
    std::vector<pumice_tensor> outputs() const { return tensors(output_count, output); }

    decltype(&pumice_abi) abi;
    decltype(&pumice_manifest) manifest;
    decltype(&pumice_input_count) input_count;
    decltype(&pumice_output_count) output_count;
    decltype(&pumice_input) input;
    decltype(&pumice_output) output;
    decltype(&pumice_open) open;
    decltype(&pumice_run) run;
    decltype(&pumice_verify) verify;
    decltype(&pumice_error) error;
    decltype(&pumice_close) close;

  private:
    template <typename Function> void find(Function &function, const char *name) {
        function = reinterpret_cast<Function>(dlsym(library_.get(), name));
        if (!function) throw Error(PUMICE_BAD_ARGUMENT, std::string(name) + " is missing: no library of Pumice's");
    }

    static std::vector<pumice_tensor> tensors(decltype(&pumice_input_count) count, decltype(&pumice_input) get) {
        std::vector<pumice_tensor> found;
        for (std::uint32_t i = 0; i < count(); i++) found.push_back(*get(i));
        return found;
    }

    std::unique_ptr<void, int (*)(void *)> library_;
};

// Memory and threads to run a model with; the model must live longer. One caller at a time.
class Instance {
  public:
    explicit Instance(const Model &model, std::uint32_t threads = 1) : model_(model), handle_(nullptr, model.close) {
        pumice_instance *handle = nullptr;
        std::string message(PUMICE_MESSAGE, '\0');
        const pumice_status status = model.open(threads, &handle, message.data(), message.size());
        handle_.reset(handle);
        if (status != PUMICE_OK) throw Error(status, message.c_str());
    }

    // One inference into buffers of the caller's: nothing is allocated.
    void run(const void *const *inputs, void *const *outputs) { check(model_.run(handle_.get(), inputs, outputs)); }

    // One inference; the bytes of each input in, those of each output out.
    std::vector<std::vector<std::byte>> run(const std::vector<std::vector<std::byte>> &inputs) {
        const auto expected = model_.inputs();
        if (inputs.size() != expected.size()) throw Error(PUMICE_BAD_ARGUMENT, "wrong number of inputs");
        std::vector<const void *> in;
        for (std::size_t i = 0; i < inputs.size(); i++) {
            if (inputs[i].size() != expected[i].bytes)
                throw Error(PUMICE_BAD_ARGUMENT, std::string("input ") + expected[i].name + " has a wrong size");
            in.push_back(inputs[i].data());
        }
        std::vector<std::vector<std::byte>> outputs;
        for (const pumice_tensor &tensor : model_.outputs()) outputs.emplace_back(tensor.bytes);
        std::vector<void *> out;
        for (auto &output : outputs) out.push_back(output.data());
        run(in.data(), out.data());
        return outputs;
    }

    // Throws with status PUMICE_DIFFERS where the numbers on this machine are not those of the compiler's.
    void verify() { check(model_.verify(handle_.get(), nullptr)); }

  private:
    void check(pumice_status status) const {
        if (status != PUMICE_OK) throw Error(status, model_.error(handle_.get()));
    }

    const Model &model_;
    std::unique_ptr<pumice_instance, decltype(&pumice_close)> handle_;
};

}  // namespace pumice
