/* CBC of OpenSSL's legacy provider and of libgcrypt, a packet at a time, the key set up once.
 * Prints: cipher kernel direction packet seconds-a-packet cycles-a-packet (0 without a time stamp counter).
 * cc -O2 anchors.c [-DOPENSSL -lcrypto] [-DGCRYPT -lgcrypt] */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef GCRYPT
#include <gcrypt.h>
#endif
#ifdef OPENSSL
#include <openssl/evp.h>
#include <openssl/provider.h>
#endif
#ifdef __x86_64__
#include <x86intrin.h>
#define CYCLES() __rdtsc()
#else
#define CYCLES() 0
#endif

enum { PARTS = 5, LARGEST = 1440 };
static unsigned char key[16] = "sixteen octets..", iv[8] = "an IV...", buffer[LARGEST];
static double millis = 20;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* The best of five parts: other load can only make a part slower. */
static void measure(const char *cipher, const char *kernel, const char *direction, void (*run)(void *, int), void *what) {
    static const int sizes[] = {64, 576, 1440};
    for (int s = 0; s < 3; s++) {
        double best = 1e9, cycles = 0;
        run(what, sizes[s]);
        for (int part = 0; part < PARTS; part++) {
            double start = now(), elapsed;
            uint64_t first = CYCLES();
            long runs = 0;
            do {
                run(what, sizes[s]);
                runs++;
                elapsed = now() - start;
            } while (elapsed < millis / 1e3 / PARTS);
            if (elapsed / runs < best) {
                best = elapsed / runs;
                cycles = (double)(CYCLES() - first) / runs;
            }
        }
        printf("%s %s %s %d %.12f %.3f\n", cipher, kernel, direction, sizes[s], best, cycles);
        fflush(stdout);
    }
}

#ifdef OPENSSL
static void openssl_run(void *what, int size) {
    EVP_CIPHER_CTX *context = what;
    int length;
    EVP_CipherInit_ex(context, NULL, NULL, NULL, iv, -1);
    EVP_CipherUpdate(context, buffer, &length, buffer, size);
}

static void openssl(void) {
    OSSL_PROVIDER_load(NULL, "default");
    OSSL_PROVIDER_load(NULL, "legacy");
    static const char *names[][2] = {{"BF-CBC", "blowfish"}, {"IDEA-CBC", "idea"}};
    for (int i = 0; i < 2; i++) {
        EVP_CIPHER *cipher = EVP_CIPHER_fetch(NULL, names[i][0], NULL);
        if (!cipher)
            continue;
        for (int encrypt = 1; encrypt >= 0; encrypt--) {
            EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
            EVP_CipherInit_ex(context, cipher, NULL, key, iv, encrypt);
            EVP_CIPHER_CTX_set_padding(context, 0);
            measure(names[i][1], "openssl", encrypt ? "encrypt" : "decrypt", openssl_run, context);
            EVP_CIPHER_CTX_free(context);
        }
        EVP_CIPHER_free(cipher);
    }
}
#endif

#ifdef GCRYPT
static void gcrypt_encrypt(void *what, int size) {
    gcry_cipher_setiv(what, iv, sizeof iv);
    gcry_cipher_encrypt(what, buffer, size, NULL, 0);
}

static void gcrypt_decrypt(void *what, int size) {
    gcry_cipher_setiv(what, iv, sizeof iv);
    gcry_cipher_decrypt(what, buffer, size, NULL, 0);
}

static void gcrypt(void) {
    static const struct { int id; const char *name; } ciphers[] = {{GCRY_CIPHER_BLOWFISH, "blowfish"}, {GCRY_CIPHER_IDEA, "idea"}};
    gcry_check_version(NULL);
    gcry_control(GCRYCTL_DISABLE_SECMEM, 0);
    gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0);
    for (int i = 0; i < 2; i++) {
        gcry_cipher_hd_t handle;
        if (gcry_cipher_open(&handle, ciphers[i].id, GCRY_CIPHER_MODE_CBC, 0))
            continue;
        gcry_cipher_setkey(handle, key, sizeof key);
        measure(ciphers[i].name, "libgcrypt", "encrypt", gcrypt_encrypt, handle);
        measure(ciphers[i].name, "libgcrypt", "decrypt", gcrypt_decrypt, handle);
        gcry_cipher_close(handle);
    }
}
#endif

int main(int count, char **words) {
    if (count > 1)
        millis = atof(words[1]);
#ifdef OPENSSL
    openssl();
#endif
#ifdef GCRYPT
    gcrypt();
#endif
    return 0;
}
