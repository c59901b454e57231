// What an image needs beside the device, as little as there can be: this is
// linked to be measured, not run.
#include "device.h"

uint8_t ram[RAM_BYTES], disk[DISK_BYTES];
static volatile uint32_t window[4]; // what the guest does; and the console

void say(unsigned code) {
    window[3] = code;
}

void start(void) {
    for (device_begin();; device_run()) {
        if (window[0]) {
            device_store(window[1], window[2]);
        } else {
            window[2] = device_load(window[1]);
        }
    }
}
