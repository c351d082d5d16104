// Logits of a MINDIR classifier for every image of a folder: threads decode, this one feeds the device and writes.

#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <iostream>
#include <opencv2/core/utility.hpp>
#include <opencv2/core/utils/logger.hpp>
#include <string>
#include <utility>
#include <vector>

#include "classifier.h"
#include "error.h"
#include "images.h"
#include "library_log.h"
#include "options.h"
#include "ordered_queue.h"
#include "preprocess.h"
#include "progress.h"
#include "results.h"

namespace {

constexpr int kCannotRun = 2, kSkipped = 3, kInterrupted = 130;

volatile std::sig_atomic_t interrupted = 0;

// The first Ctrl-C ends the run when the model is done with its batch, a second one at once.
void CatchInterrupts() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupted = 1; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

// A folder of images through the model, in batches. The last batch is filled up with what the one before left.
int Infer(const Options& options, const std::vector<ImageFile>& images, Classifier& classifier, Results& results) {
  const Preprocess preprocess(options.resize, options.crop, options.interpolation);
  const size_t batch_size = options.batch_size, threads = options.num_threads;
  OrderedQueue<Prepared> queue(images.size(), 2 * std::max(batch_size, threads), threads,
                               [&](size_t number) { return preprocess(images[number].path); });
  Progress progress(images.size());
  std::vector<std::string> names;
  std::vector<double> batch_ms;
  for (size_t number = 0; number < images.size() && !interrupted; ++number) {
    const Prepared image = queue.Take();
    if (image.problem.empty()) {
      std::copy(image.tensor.begin(), image.tensor.end(), classifier.Input() + names.size() * image.tensor.size());
      names.push_back(images[number].name);
    } else {
      progress.Warn(images[number].path.string() + " " + image.problem + "; going on without it");
    }
    progress.Add(!image.problem.empty());
    if (names.size() == batch_size || (number + 1 == images.size() && !names.empty())) {
      const auto start = std::chrono::steady_clock::now();
      const std::vector<float>& logits = classifier.Infer();
      const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
      batch_ms.push_back(spent.count());
      for (size_t row = 0; row < names.size(); ++row) {
        results.Write(names[row], logits.data() + row * classifier.classes(), classifier.classes());
      }
      names.clear();
    }
  }
  progress.Finish();
  if (interrupted) {
    Messages() << "interrupted; go on with --resume" << std::endl;
    return kInterrupted;
  }
  if (!batch_ms.empty()) {
    results.WriteTimes(progress.computed(), progress.skipped(), std::move(batch_ms), progress.images_per_s());
  }
  return progress.skipped() ? kSkipped : 0;
}

// The run with its model; what the libraries say goes to `log`.
int RunModel(const Options& options, std::vector<ImageFile> images, Results& results, const LibraryLog& log) {
  Classifier classifier(options);
  log.Clear();  // remarks on a model that works
  if (interrupted) {  // while the model was loaded: an earlier run's results stay
    Messages() << "interrupted" << std::endl;
    return kInterrupted;
  }
  if (const size_t removed = results.Begin()) {
    std::cout << "removed " << removed << " results of an earlier run from " << results.folder().string() << '\n';
  }
  if (options.resume) {
    const size_t all = images.size();
    const auto done = [&](const ImageFile& image) { return results.Has(image.name, classifier.classes()); };
    images.erase(std::remove_if(images.begin(), images.end(), done), images.end());
    std::cout << all - images.size() << " of " << all << " images are done already\n";
  }
  std::cout << images.size() << " images, " << classifier.classes() << " classes, " << options.device_target
            << std::endl;
  const int status = Infer(options, images, classifier, results);
  if (!log.IsEmpty()) {
    Messages() << "note: what libraries say of images, without their names, is in " << LibraryLogPath(options).string()
              << std::endl;
  }
  return status;
}

int Run(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  if (options.help) {
    std::cout << Help();
    return 0;
  }
  // Images come and go in blocks of a megabyte: what is freed is kept, not given back to the kernel page by page.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
  cv::setNumThreads(1);  // the queue's threads are the parallelism
  cv::utils::logging::setLogLevel(cv::utils::logging::LOG_LEVEL_SILENT);
  CatchInterrupts();
  std::vector<ImageFile> images = FindImages(options.dataset_path);
  Results results(options);
  const LibraryLog log(LibraryLogPath(options));
  return RunModel(options, std::move(images), results, log);
}

}  // namespace

int main(int argc, char** argv) try {
  return Run(argc, argv);
} catch (const std::exception& error) {
  Messages() << "error: " << error.what() << std::endl;
  return kCannotRun;
}
