// The little that these tests need of a test library: TEST registers a function, CHECK ends the run with a message.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

struct NativeTest {
  const char* name;
  void (*run)();
};

inline std::vector<NativeTest>& native_tests() {
  static std::vector<NativeTest> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { native_tests().push_back({name, run}); }
};

#define TEST(name)                                    \
  static void name();                                 \
  static const Register register_##name(#name, name); \
  static void name()

#define CHECK(condition, what)                                                                            \
  do {                                                                                                    \
    if (!(condition)) {                                                                                   \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, std::string(what).c_str()); \
      std::abort();                                                                                       \
    }                                                                                                     \
  } while (false)
