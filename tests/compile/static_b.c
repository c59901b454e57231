// The unit that drives; see static_a.c.
#define VBLK_STATIC
#define VBLK_IMPLEMENTATION_THREADED
#include "vblk.h"

void drive(vblk_worker *w, uint8_t *ram);
bool reset(vblk_worker *w);

// A FLUSH, header and status byte at 0x3000.
void drive(vblk_worker *w, uint8_t *ram) {
    static const uint16_t steps[][2] = {
        {0x70, 1},  {0x70, 3},      {0x24, 1},      {0x20, 1},
        {0x70, 11}, {0x38, 16},     {0x90, 0x1000}, {0xa0, 0x2000},
        {0x44, 1},  {0x70, 15},     {0x50, 0}};
    ram[1] = 0x30, ram[8] = 16, ram[12] = 1, ram[14] = 1;
    ram[16] = 16, ram[17] = 0x30, ram[24] = 1, ram[28] = 2;
    ram[0x3000] = VBLK_T_FLUSH;
    ram[0x1002] = 1;
    for (unsigned i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        vblk_worker_mmio_write(w, steps[i][0], 4, steps[i][1]);
    }
}

bool reset(vblk_worker *w) {
    return vblk_worker_mmio_write(w, VBLK_REG_STATUS, 4, 0) == VBLK_OK;
}
