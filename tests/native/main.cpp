// Runs all tests, or those whose name contains the first argument.
#include <cstring>

#include "native_test.h"

int main(int argc, char** argv) {
  int num_run = 0;
  for (const NativeTest& test : native_tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    test.run();
    std::printf("passed %s\n", test.name);
    std::fflush(stdout);
    ++num_run;
  }
  if (num_run == 0) std::fprintf(stderr, "no test has %s in its name\n", argc > 1 ? argv[1] : "");
  return num_run == 0;
}
