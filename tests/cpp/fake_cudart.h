// How a test sets up the runtime of fake_cudart.cc, and reads what was done with it.
#pragma once

#include <string>

extern "C" {
// The one device there is; capability 0: none.
void fake_device(int capability, int multiprocessors, int shared_limit, int ordinal);
// The call of that name fails from now on; "" for none.
void fake_fail(const char* call);
// Loads, copies and launches since the last call: one line of JSON each.
const char* fake_log();
}
