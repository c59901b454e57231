// The implementation, with all its defaults; see layout_a.c.
#define VBLK_IMPLEMENTATION_THREADED
#include "vblk.h"

size_t size_there(int what);
int    next_there(vblk_dev *dev, vblk_request *r, vblk_seg *seg, unsigned room);

size_t size_there(int what) {
    const size_t size[] = {sizeof(vblk_dev),     sizeof(vblk_queue),
                           sizeof(vblk_request), sizeof(vblk_seg),
                           sizeof(vblk_options), sizeof(vblk_event),
                           sizeof(vblk_worker),  sizeof(vblk_file),
                           sizeof(vblk_engine)};
    return size[what];
}

int next_there(vblk_dev *dev, vblk_request *r, vblk_seg *seg, unsigned room) {
    return vblk_next(dev, 0, 0, r, seg, room);
}
