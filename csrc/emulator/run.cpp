// run CASE INPUT OUTPUT: reads the arrays of INPUT, runs the case, writes its arrays to OUTPUT.
//
// An array: length of the name and name, length of the dtype and dtype, number of axes and axes (all lengths int64), data.
#include <cstdio>
#include <fstream>

#include "cases.h"

namespace {

int64_t read_number(std::ifstream& file) {
  int64_t number = 0;
  file.read(reinterpret_cast<char*>(&number), sizeof(number));
  return number;
}

std::string read_text(std::ifstream& file) {
  std::string text(static_cast<size_t>(read_number(file)), ' ');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  return text;
}

void write_number(std::ofstream& file, int64_t number) {
  file.write(reinterpret_cast<const char*>(&number), sizeof(number));
}

void write_text(std::ofstream& file, const std::string& text) {
  write_number(file, static_cast<int64_t>(text.size()));
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
}

} // namespace

int main(int count, char** words) {
  const auto found = count == 4 ? emulator::cases().find(words[1]) : emulator::cases().end();
  if (found == emulator::cases().end()) {
    std::fprintf(stderr, "emulator: no such case, or not CASE INPUT OUTPUT\n");
    return 2;
  }
  emulator::Case one;
  std::ifstream input(words[2], std::ios::binary);
  for (int64_t arrays = read_number(input); arrays > 0; --arrays) {
    const std::string name = read_text(input), dtype = read_text(input);
    std::vector<int64_t> shape(static_cast<size_t>(read_number(input)));
    for (int64_t& n : shape) {
      n = read_number(input);
    }
    emulator::Array array = emulator::make_array(dtype, shape);
    input.read(reinterpret_cast<char*>(array.bytes.get()), static_cast<std::streamsize>(array.size));
    one.inputs[name] = std::move(array);
  }
  if (!input) {
    std::fprintf(stderr, "emulator: the input is cut short\n");
    return 2;
  }
  try {
    const int code = found->second(one);
    if (code != 0) {
      std::fprintf(stderr, "emulator: the launcher returned %d\n", code);
      return 4;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulator: %s\n", error.what());
    return 2;
  }
  std::ofstream output(words[3], std::ios::binary);
  write_number(output, static_cast<int64_t>(one.outputs.size()));
  for (const auto& [name, array] : one.outputs) {
    write_text(output, name);
    write_text(output, array.dtype);
    write_number(output, static_cast<int64_t>(array.shape.size()));
    for (int64_t n : array.shape) {
      write_number(output, n);
    }
    output.write(reinterpret_cast<const char*>(array.bytes.get()), static_cast<std::streamsize>(array.size));
  }
  output.close();
  return output ? 0 : 2;
}
