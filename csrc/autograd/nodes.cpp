// The nodes in one translation unit: torch's headers take 11 s to compile, these files 3.

#include "node.cpp"
#include "ops.cpp"
#include "row_node.cpp"
#include "row_ops.cpp"
