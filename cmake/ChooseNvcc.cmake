# ChooseNvcc.cmake: picks the CUDA compiler. In this order: one that the user names (CMAKE_CUDA_COMPILER or CUDACXX), an
# nvcc on PATH that is new enough for every architecture below, the nvcc of the PyPI wheels among the build requirements.
set(JAX_HADACORE_OLDEST_NVCC 12.8)  # the first with sm_100 and sm_120

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  # Machine code for the GPUs of servers and desktops since Ampere, and PTX for those to come. That of the latter three
  # is made from PTX of the former, where it can be (CMakeLists.txt).
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
  set(JAX_HADACORE_MORE_ARCHITECTURES 86-real 89-real 120-real)
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
endif()
# GPUs of sm_90 run code for sm_90a as well, which alone may use the products of warp groups.
list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90$" "90a-real;90-virtual")
list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90-real$" "90a-real")

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  set(rejected "none on PATH")
  find_program(JAX_HADACORE_PATH_NVCC nvcc NO_CACHE)
  if(JAX_HADACORE_PATH_NVCC)
    execute_process(COMMAND "${JAX_HADACORE_PATH_NVCC}" --version OUTPUT_VARIABLE version ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" version "${version}")
    if(CMAKE_MATCH_1 VERSION_GREATER_EQUAL JAX_HADACORE_OLDEST_NVCC)
      set(CMAKE_CUDA_COMPILER "${JAX_HADACORE_PATH_NVCC}")
    else()
      set(rejected "${JAX_HADACORE_PATH_NVCC} is ${CMAKE_MATCH_1}, older than ${JAX_HADACORE_OLDEST_NVCC}")
    endif()
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    execute_process(COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/wheel_nvcc.py"
                    OUTPUT_VARIABLE wheel_nvcc OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    if(NOT wheel_nvcc)
      message(FATAL_ERROR
        "JAX_HADACORE_CUDA is ON, but there is no CUDA compiler (${rejected}; no PyPI wheel). Any of these helps:\n"
        "  - build with pip's build isolation, which brings nvcc, or install its wheels first:\n"
        "    pip install nvidia-cuda-{nvcc,crt,runtime,cccl}==13.0.* nvidia-nvvm==13.0.*\n"
        "  - name an nvcc of ${JAX_HADACORE_OLDEST_NVCC} or newer: CUDACXX=/path/to/nvcc\n"
        "  - build for the CPU alone: pip install . -C cmake.define.JAX_HADACORE_CUDA=OFF")
    endif()
    set(CMAKE_CUDA_COMPILER "${wheel_nvcc}")
    # The wheels keep libcudart_static.a in lib/, where nvcc 13.0 does not look.
    cmake_path(GET wheel_nvcc PARENT_PATH bin)
    cmake_path(GET bin PARENT_PATH root)
    set(JAX_HADACORE_CUDA_LIBRARIES "${root}/lib")
    string(APPEND CMAKE_CUDA_FLAGS " -L${root}/lib")
  endif()
endif()
