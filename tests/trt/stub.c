// SPDX-License-Identifier: Apache-2.0
//
// The C functions that NVIDIA's Python bindings of TensorRT import. With them the bindings load on
// a machine without TensorRT, so that its plugin classes and descriptions are the genuine ones;
// tests/trt/driver.py plays the rest.
#include <stddef.h>

#define NOTHING(name) \
  void* name() { return NULL; }

NOTHING(createInferBuilder_INTERNAL)
NOTHING(createInferRefitter_INTERNAL)
NOTHING(createInferRuntime_INTERNAL)
NOTHING(createNvOnnxParser_INTERNAL)
NOTHING(createNvOnnxParserRefitter_INTERNAL)
NOTHING(getBuilderPluginRegistry)
NOTHING(getPluginRegistry)
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void* logger, const char* name) { return 1; }
