// CBC of Botan, a packet at a time, the key set up once. Prints as anchors.c does.
// c++ -O2 anchors.cpp $(pkg-config --cflags --libs botan-2)
#include <botan/cipher_mode.h>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#ifdef __x86_64__
#include <x86intrin.h>
static std::uint64_t cycles_now() { return __rdtsc(); }
#else
static std::uint64_t cycles_now() { return 0; }
#endif

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int main(int count, char **words) {
    const int parts = 5;
    const double millis = count > 1 ? std::atof(words[1]) : 20;
    const std::uint8_t key[17] = "sixteen octets..", iv[9] = "an IV...";
    const char *ciphers[][2] = {{"Blowfish", "blowfish"}, {"IDEA", "idea"}};
    for (auto &cipher : ciphers) {
        for (bool encrypt : {true, false}) {
            auto mode = Botan::Cipher_Mode::create(std::string(cipher[0]) + "/CBC/NoPadding", encrypt ? Botan::ENCRYPTION : Botan::DECRYPTION);
            if (!mode)
                continue;
            mode->set_key(key, 16);
            for (int size : {64, 576, 1440}) {
                Botan::secure_vector<std::uint8_t> buffer(size);
                double best = 1e9, cycles = 0;
                for (int part = 0; part < parts; part++) {
                    const double start = now();
                    const std::uint64_t first = cycles_now();
                    double elapsed;
                    long runs = 0;
                    do {
                        mode->start(iv, 8);
                        mode->finish(buffer);
                        runs++;
                        elapsed = now() - start;
                    } while (elapsed < millis / 1e3 / parts);
                    if (elapsed / runs < best) {
                        best = elapsed / runs;
                        cycles = double(cycles_now() - first) / runs;
                    }
                }
                std::printf("%s botan %s %d %.12f %.3f\n", cipher[1], encrypt ? "encrypt" : "decrypt", size, best, cycles);
                std::fflush(stdout);
            }
        }
    }
}
