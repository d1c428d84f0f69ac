"""Memory allocation of workers: settings of glibc, which reads them when a process starts."""

#: Dask's settings would return freed memory at once, and page it in again for each image: decoding took 4.4 ms per
#: image instead of 2.8. All threads share one arena, because an arena cannot use what another has freed: with several,
#: 16 images of 100 million pixels, decoded one after the other by 4 threads, took 3.2 GB instead of 0.84, equally fast.
MALLOC_VARIABLES = {
    "MALLOC_TRIM_THRESHOLD_": str(64 * 1024**2),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_ARENA_MAX": "1",
}
