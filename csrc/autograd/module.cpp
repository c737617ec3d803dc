// What Python calls in one translation unit, for the reason that nodes.cpp has.

#include "python.cpp"
#include "row_python.cpp"
