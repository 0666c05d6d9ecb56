// An engine of a bundle in a C++ application: TensorRT 10 or newer and the CUDA runtime, nothing of faqd.
//
//     g++ -std=c++17 -O2 07_engine.cpp -I/usr/local/cuda/include -L/usr/local/cuda/lib64 -lnvinfer -lcudart -o engine
//     ./engine bundle/student.tensorrt.engine input.bin
//
// `faqd-deploy build-engine bundle` makes the engine on the machine that runs it. input.bin holds the network's input,
// one image after the other, as docs/using.md says; without it the images are zeros. Every output is written to
// NAME.bin. Untested on a GPU: it is compiled against the headers of TensorRT and has run nowhere yet.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << text << '\n';
    }
};

void must(bool done, const std::string& what) {
    if (!done) throw std::runtime_error(what);
}

std::vector<char> read(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    must(stream.good(), path + ": cannot be read");
    return {std::istreambuf_iterator<char>(stream), {}};
}

std::size_t bytes_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return 4;
        case nvinfer1::DataType::kUINT8: return 1;
        default: throw std::runtime_error("an engine of faqd has float32 or uint8 at its ends");
    }
}

std::size_t bytes_of(const nvinfer1::Dims& shape, nvinfer1::DataType type) {
    std::size_t bytes = bytes_of(type);
    for (int axis = 0; axis < shape.nbDims; ++axis) bytes *= static_cast<std::size_t>(shape.d[axis]);
    return bytes;
}

int run(const std::string& plan_path, const std::string& input_path) {
    Logger logger;
    const std::vector<char> plan = read(plan_path);
    const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
    must(runtime != nullptr, "TensorRT does not start; is there an NVIDIA GPU?");
    const std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    must(engine != nullptr, plan_path + ": built by another TensorRT or for another GPU; build it here");
    const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
    must(context != nullptr, "no execution context");
    cudaStream_t stream = nullptr;
    must(cudaStreamCreate(&stream) == cudaSuccess, "no CUDA stream");

    std::map<std::string, std::vector<char>> host;
    std::map<std::string, void*> device;
    // Inputs first: the shapes of outputs follow from theirs.
    for (const auto mode : {nvinfer1::TensorIOMode::kINPUT, nvinfer1::TensorIOMode::kOUTPUT}) {
        for (int index = 0; index < engine->getNbIOTensors(); ++index) {
            const char* name = engine->getIOTensorName(index);
            if (engine->getTensorIOMode(name) != mode) continue;
            const bool is_input = mode == nvinfer1::TensorIOMode::kINPUT;
            nvinfer1::Dims shape = is_input ? engine->getTensorShape(name) : context->getTensorShape(name);
            const auto type = engine->getTensorDataType(name);
            if (is_input) {
                shape.d[0] = 1;
                std::vector<char> images = input_path.empty() ? std::vector<char>{} : read(input_path);
                const std::size_t one = bytes_of(shape, type);
                if (images.empty()) images.resize(one);
                must(images.size() % one == 0, input_path + ": is no whole number of images");
                shape.d[0] = static_cast<std::int64_t>(images.size() / one);
                must(context->setInputShape(name, shape), "more images than the engine was built for");
                host[name] = images;
            } else {
                host[name].resize(bytes_of(shape, type));
            }
            must(cudaMalloc(&device[name], host[name].size()) == cudaSuccess, "no memory on the GPU");
            must(context->setTensorAddress(name, device[name]), "no address");
            if (is_input)
                cudaMemcpyAsync(device[name], host[name].data(), host[name].size(), cudaMemcpyHostToDevice, stream);
        }
    }
    must(context->enqueueV3(stream), "the engine did not run");
    for (auto& [name, values] : host) {
        if (engine->getTensorIOMode(name.c_str()) != nvinfer1::TensorIOMode::kOUTPUT) continue;
        cudaMemcpyAsync(values.data(), device[name], values.size(), cudaMemcpyDeviceToHost, stream);
        must(cudaStreamSynchronize(stream) == cudaSuccess, "the GPU failed");
        std::ofstream(name + ".bin", std::ios::binary).write(values.data(), static_cast<std::streamsize>(values.size()));
        std::cout << name << ": " << values.size() << " bytes\n";
    }
    for (auto& [name, memory] : device) cudaFree(memory);
    cudaStreamDestroy(stream);
    return 0;
}

int main(int count, char** arguments) {
    try {
        must(count > 1, "usage: engine FILE.engine [input.bin]");
        return run(arguments[1], count > 2 ? arguments[2] : "");
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 2;
    }
}
