"""Writes what libvhdi reads of a chain of VHDX images, the base first, to a file.

Usage: libvhdi_read.py OUT BASE [CHILD...]
"""
import ctypes
import sys

CHUNK = 1 << 20
VOID = ctypes.c_void_p
ERROR = ctypes.POINTER(VOID)

lib = ctypes.CDLL("libvhdi.so.1")
lib.libvhdi_file_open.argtypes = [VOID, ctypes.c_char_p, ctypes.c_int, ERROR]
lib.libvhdi_file_set_parent_file.argtypes = [VOID, VOID, ERROR]
lib.libvhdi_file_get_media_size.argtypes = [VOID, ctypes.POINTER(ctypes.c_uint64), ERROR]
lib.libvhdi_file_read_buffer_at_offset.argtypes = [VOID, VOID, ctypes.c_size_t, ctypes.c_int64, ERROR]
lib.libvhdi_file_read_buffer_at_offset.restype = ctypes.c_ssize_t
lib.libvhdi_error_sprint.argtypes = [VOID, ctypes.c_char_p, ctypes.c_size_t]


def call(function, *args):
    error = VOID()
    result = function(*args, ctypes.byref(error))
    if result < 0:
        text = ctypes.create_string_buffer(4096)
        lib.libvhdi_error_sprint(error, text, len(text))
        sys.exit(text.value.decode(errors="replace"))
    return result


def open_chain(names):
    below = None
    for name in names:
        image = VOID()
        call(lib.libvhdi_file_initialize, ctypes.byref(image))
        call(lib.libvhdi_file_open, image, name.encode(), 1)
        if below is not None:
            call(lib.libvhdi_file_set_parent_file, image, below)
        below = image
    return below


def main():
    top = open_chain(sys.argv[2:])
    size = ctypes.c_uint64()
    call(lib.libvhdi_file_get_media_size, top, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(CHUNK)
    with open(sys.argv[1], "wb") as out:
        while out.tell() < size.value:
            want = min(CHUNK, size.value - out.tell())
            got = call(lib.libvhdi_file_read_buffer_at_offset, top, buffer, want, out.tell())
            if got == 0:
                sys.exit("no more bytes at %d of %d" % (out.tell(), size.value))
            out.write(buffer.raw[:got])


main()
