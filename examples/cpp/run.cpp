// Runs a compiled model on every thread of the machine, each with an instance of its own, and prints the last answers.
//
//     c++ -std=c++17 -O2 -I ../../targets/runtime run.cpp -o run -ldl -pthread
//     ./run ./model.so image.bin            one file for each input: its elements, row-major, nothing else
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>

#include "model.hpp"

using Bytes = std::vector<std::byte>;

static Bytes read_file(const char *path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(std::string(path) + ": cannot be opened");
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    Bytes bytes(text.size());
    std::memcpy(bytes.data(), text.data(), text.size());
    return bytes;
}

static void print(const pumice_tensor &tensor, const Bytes &bytes) {
    std::printf("%s:", tensor.name);
    if (std::strcmp(tensor.dtype, "float32") == 0)
        for (std::size_t i = 0; i < bytes.size() / sizeof(float); i++) {
            float value;
            std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
            std::printf(" %.9g", static_cast<double>(value));
        }
    else
        for (const std::byte byte : bytes) std::printf(" %d", std::to_integer<int>(byte));
    std::printf("\n");
}

int main(int count, char **arguments) try {
    if (count < 2) throw std::runtime_error("usage: run ./model.so INPUT.bin ...");
    const pumice::Model model(arguments[1]);
    std::vector<Bytes> inputs;
    for (int i = 2; i < count; i++) inputs.push_back(read_file(arguments[i]));

    const unsigned callers = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::vector<Bytes>> answers(callers);
    std::vector<std::string> failures(callers);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < callers; i++)
        threads.emplace_back([&, i] {
            try {
                answers[i] = pumice::Instance(model).run(inputs);
            } catch (const std::exception &error) {
                failures[i] = error.what();
            }
        });
    for (std::thread &thread : threads) thread.join();
    for (unsigned i = 0; i < callers; i++) {
        if (!failures[i].empty()) throw std::runtime_error(failures[i]);
        if (answers[i] != answers[0]) throw std::runtime_error("two threads have different answers");
    }
    const auto outputs = model.outputs();
    for (std::size_t i = 0; i < outputs.size(); i++) print(outputs[i], answers[0][i]);
} catch (const std::exception &error) {
    std::fprintf(stderr, "run: %s\n", error.what());
    return 1;
}
