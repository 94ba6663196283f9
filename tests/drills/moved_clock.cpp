// A wall clock that can be moved, for LD_PRELOAD: `move_clock(seconds)` moves it in this process.
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

#include <atomic>

namespace {
std::atomic<long> moved{0};

template <typename Function>
Function real(const char* name, Function) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}
}  // namespace

extern "C" {
void move_clock(long seconds) { moved += seconds; }

int clock_gettime(clockid_t clock, struct timespec* now) noexcept {
    static const auto theirs = real("clock_gettime", &clock_gettime);
    const int code = theirs(clock, now);
    if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += moved;
    return code;
}

time_t time(time_t* out) noexcept {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval* now, void*) noexcept {
    struct timespec found;
    const int code = clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return code;
}
}
