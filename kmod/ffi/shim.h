/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef DTLOOP_SHIM_H
#define DTLOOP_SHIM_H

#include <linux/types.h>

struct bio;
struct block_device;
struct device;
struct file;
struct gendisk;
struct inode;
struct page;
struct wait_queue_head;

extern const u32 dtloop_feat_write_cache;
extern const u32 dtloop_feat_fua;
extern const u32 dtloop_feat_nowait;
extern const u32 dtloop_feat_io_stat;
extern const u32 dtloop_feat_atomic_writes;
extern const u32 dtloop_open_read;
extern const u32 dtloop_open_write;
extern const u32 dtloop_bioset_need_bvecs;
extern const u32 dtloop_gd_suppress_part_scan;
extern const u32 dtloop_gfp_noio;
extern const u32 dtloop_gfp_retry_mayfail;
extern const u32 dtloop_hz;

void dtloop_bio_set_dev(struct bio *bio, struct block_device *bdev);
void dtloop_bio_copy_out(struct bio *bio, void *const *pieces, unsigned int shift, u64 pos);
void dtloop_bio_pass_read(struct bio *bio, struct block_device *bdev, u64 offset);
u64 dtloop_bdev_reads(struct block_device *bdev);
u64 dtloop_bdev_read_sectors(struct block_device *bdev);
u64 dtloop_bdev_written_sectors(struct block_device *bdev);
u64 dtloop_bdev_sectors(struct block_device *bdev);
u32 dtloop_bdev_block_bytes(struct block_device *bdev);
bool dtloop_bdev_read_only(struct block_device *bdev);
bool dtloop_bdev_is_zoned(struct block_device *bdev);
u32 dtloop_bdev_unmap_zeroes_sectors(struct block_device *bdev);
u64 dtloop_file_block_dev(struct file *file);
dev_t dtloop_decode_dev(u64 dev);
u64 dtloop_encode_dev(dev_t dev);
unsigned int dtloop_disk_openers(struct gendisk *disk);
struct gendisk *dtloop_dev_to_disk(struct device *dev);
u64 dtloop_real_ns(void);
u64 dtloop_monotonic_ns(void);
bool dtloop_fatal_signal(void);
bool dtloop_waitqueue_active(struct wait_queue_head *head);
unsigned int dtloop_iminor(struct inode *inode);
int dtloop_bdev_name(struct block_device *bdev, char *name, size_t bytes);
struct page *dtloop_virt_to_page(const void *address);
size_t dtloop_available_pages(void);
dev_t dtloop_mkdev(unsigned int major, unsigned int minor);
bool dtloop_file_writable(struct file *file);
struct block_device *dtloop_file_device(struct file *file);
u64 dtloop_file_bytes(struct file *file);
u32 dtloop_file_block_bytes(struct file *file);
int dtloop_file_bmap(struct file *file, u64 *block);
int dtloop_file_claim(struct file *file);
void dtloop_file_unclaim(struct file *file);
void dtloop_file_get(struct file *file);
u32 dtloop_crc32(const void *data, size_t bytes);

#endif
