// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the Rust bindings lack: inline functions, macros and constants of the block layer.
 * There is no logic here; each function is called from the wrapper in kmod/ffi/ that names it.
 */

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/crc32.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/major.h>
#include <linux/mm.h>
#include <linux/part_stat.h>
#include <linux/poll.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/timekeeping.h>
#include <linux/wait.h>

#include "shim.h"

const u32 dtloop_feat_write_cache = (__force u32)BLK_FEAT_WRITE_CACHE;
const u32 dtloop_feat_fua = (__force u32)BLK_FEAT_FUA;
const u32 dtloop_feat_nowait = (__force u32)BLK_FEAT_NOWAIT;
const u32 dtloop_feat_io_stat = (__force u32)BLK_FEAT_IO_STAT;
const u32 dtloop_feat_atomic_writes = (__force u32)BLK_FEAT_ATOMIC_WRITES;
const u32 dtloop_open_read = (__force u32)BLK_OPEN_READ;
const u32 dtloop_open_write = (__force u32)BLK_OPEN_WRITE;
const u32 dtloop_bioset_need_bvecs = BIOSET_NEED_BVECS;
const u32 dtloop_gd_suppress_part_scan = GD_SUPPRESS_PART_SCAN;
const u32 dtloop_gfp_noio = (__force u32)GFP_NOIO;
const u32 dtloop_gfp_retry_mayfail = (__force u32)__GFP_RETRY_MAYFAIL;
const u32 dtloop_hz = HZ;

void dtloop_bio_set_dev(struct bio *bio, struct block_device *bdev)
{
	bio_set_dev(bio, bdev);
}

/*
 * Copy the data of @bio to the byte position @pos of an area that consists of pieces of
 * 1 << @shift bytes each, physically and virtually contiguous, whose addresses are @pieces.
 */
void dtloop_bio_copy_out(struct bio *bio, void *const *pieces, unsigned int shift, u64 pos)
{
	const u64 mask = (1ULL << shift) - 1;
	struct bvec_iter iter;
	struct bio_vec bv;

	bio_for_each_segment(bv, bio, iter) {
		void *from = bvec_kmap_local(&bv);
		unsigned int done = 0;

		while (done < bv.bv_len) {
			u64 room = mask + 1 - (pos & mask);
			unsigned int len = min_t(u64, room, bv.bv_len - done);

			memcpy(pieces[pos >> shift] + (pos & mask), from + done, len);
			pos += len;
			done += len;
		}
		kunmap_local(from);
	}
}

/*
 * Counts a read of the disk it came for and sends it on to @bdev, @offset sectors further. One call,
 * as it is all that a read costs.
 */
void dtloop_bio_pass_read(struct bio *bio, struct block_device *bdev, u64 offset)
{
	struct block_device *upper = bio->bi_bdev;

	part_stat_lock();
	part_stat_inc(upper, ios[STAT_READ]);
	part_stat_add(upper, sectors[STAT_READ], bio_sectors(bio));
	part_stat_unlock();
	bio_set_dev(bio, bdev);
	bio->bi_iter.bi_sector += offset;
	submit_bio_noacct(bio);
}

u64 dtloop_bdev_reads(struct block_device *bdev)
{
	return part_stat_read(bdev, ios[STAT_READ]);
}

u64 dtloop_bdev_read_sectors(struct block_device *bdev)
{
	return part_stat_read(bdev, sectors[STAT_READ]);
}

u64 dtloop_bdev_written_sectors(struct block_device *bdev)
{
	return part_stat_read(bdev, sectors[STAT_WRITE]);
}

u64 dtloop_bdev_sectors(struct block_device *bdev)
{
	return bdev_nr_sectors(bdev);
}

u32 dtloop_bdev_block_bytes(struct block_device *bdev)
{
	return bdev_logical_block_size(bdev);
}

bool dtloop_bdev_read_only(struct block_device *bdev)
{
	return bdev_read_only(bdev);
}

bool dtloop_bdev_is_zoned(struct block_device *bdev)
{
	return bdev_is_zoned(bdev);
}

u32 dtloop_bdev_unmap_zeroes_sectors(struct block_device *bdev)
{
	return bdev_limits(bdev)->max_wzeroes_unmap_sectors;
}

/* The device number of a block device's open file, in the encoding of userspace, or 0. */
u64 dtloop_file_block_dev(struct file *file)
{
	struct inode *inode = file_inode(file);

	return S_ISBLK(inode->i_mode) ? huge_encode_dev(inode->i_rdev) : 0;
}

dev_t dtloop_decode_dev(u64 dev)
{
	return huge_decode_dev(dev);
}

u64 dtloop_encode_dev(dev_t dev)
{
	return huge_encode_dev(dev);
}

unsigned int dtloop_disk_openers(struct gendisk *disk)
{
	return disk_openers(disk);
}

struct gendisk *dtloop_dev_to_disk(struct device *dev)
{
	return dev_to_disk(dev);
}

u64 dtloop_real_ns(void)
{
	struct timespec64 now;

	ktime_get_coarse_real_ts64(&now);
	return timespec64_to_ns(&now);
}

u64 dtloop_monotonic_ns(void)
{
	return ktime_get_ns();
}

bool dtloop_fatal_signal(void)
{
	return fatal_signal_pending(current);
}

bool dtloop_waitqueue_active(struct wait_queue_head *head)
{
	return wq_has_sleeper(head);
}

unsigned int dtloop_iminor(struct inode *inode)
{
	return iminor(inode);
}

int dtloop_bdev_name(struct block_device *bdev, char *name, size_t bytes)
{
	return scnprintf(name, bytes, "/dev/%pg", bdev);
}

struct page *dtloop_virt_to_page(const void *address)
{
	return virt_to_page(address);
}

size_t dtloop_available_pages(void)
{
	return max(si_mem_available(), 0L);
}

dev_t dtloop_mkdev(unsigned int major, unsigned int minor)
{
	return MKDEV(major, minor);
}

/* Whether @file is a regular file that was opened for writing. */
bool dtloop_file_writable(struct file *file)
{
	return S_ISREG(file_inode(file)->i_mode) && (file->f_mode & FMODE_WRITE);
}

/* The block device under the file system of @file, or NULL. */
struct block_device *dtloop_file_device(struct file *file)
{
	return file_inode(file)->i_sb->s_bdev;
}

u64 dtloop_file_bytes(struct file *file)
{
	return i_size_read(file_inode(file));
}

u32 dtloop_file_block_bytes(struct file *file)
{
	return i_blocksize(file_inode(file));
}

int dtloop_file_bmap(struct file *file, u64 *block)
{
	sector_t sector = *block;
	int ret = bmap(file_inode(file), &sector);

	*block = sector;
	return ret;
}

/* Marks the inode as swapon() does, which keeps everybody from changing where its blocks lie. */
int dtloop_file_claim(struct file *file)
{
	struct inode *inode = file_inode(file);
	int ret = 0;

	inode_lock(inode);
	if (inode->i_flags & S_SWAPFILE)
		ret = -ETXTBSY;
	else
		inode->i_flags |= S_SWAPFILE;
	inode_unlock(inode);
	return ret;
}

void dtloop_file_unclaim(struct file *file)
{
	struct inode *inode = file_inode(file);

	inode_lock(inode);
	inode->i_flags &= ~S_SWAPFILE;
	inode_unlock(inode);
}

void dtloop_file_get(struct file *file)
{
	get_file(file);
}

u32 dtloop_crc32(const void *data, size_t bytes)
{
	return ~crc32_le(~0U, data, bytes);
}
